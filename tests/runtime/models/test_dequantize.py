"""Dequantised weights equal the `gguf` package's, bit for bit."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.runtime.models.dequantize import dequantize
from treadle.runtime.models.gguf_file import SUPPORTED_QUANTIZATIONS, GGUFFile

FLOATS_IN_BLOCK = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2]}
FLOATS_IN_BLOCK |= {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}


def random_rows(quantization, num_rows, num_blocks, rng):
    """Rows of valid blocks: every byte random but the scales, which are ordinary float16 numbers."""
    _, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[quantization]]
    if quantization in ("F32", "F16"):
        dtype = np.float32 if quantization == "F32" else np.float16
        return rng.standard_normal((num_rows, num_blocks)).astype(dtype).view(np.uint8)
    if quantization == "BF16":
        return (
            (rng.standard_normal((num_rows, num_blocks)).astype(np.float32).view(np.uint32) >> 16)
            .astype("<u2")
            .view(np.uint8)
        )
    blocks = rng.integers(0, 256, (num_rows, num_blocks, block_bytes), dtype=np.uint8)
    for start in FLOATS_IN_BLOCK[quantization]:
        scales = rng.standard_normal((num_rows, num_blocks, 1)).astype(np.float16)
        blocks[..., start : start + 2] = scales.view(np.uint8)
    return blocks.reshape(num_rows, -1)


@pytest.mark.parametrize("quantization", SUPPORTED_QUANTIZATIONS)
@given(num_rows=st.integers(1, 40), num_blocks=st.integers(1, 5), seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_any_blocks_dequantise_as_the_gguf_package_does_it(quantization, num_rows, num_blocks, seed):
    rows = random_rows(quantization, num_rows, num_blocks, np.random.default_rng(seed))
    expected = torch.from_numpy(reference(rows, GGMLQuantizationType[quantization]).copy())
    weights = dequantize(rows.reshape(-1), quantization, tuple(expected.shape))
    assert weights.dtype == torch.float32
    assert torch.equal(weights, expected)


def test_the_real_model_dequantises_as_the_gguf_package_does_it(smollm2_path):
    file = GGUFFile(smollm2_path)
    for info in file.tensors.values():
        rows = file.raw(info.name).reshape(*info.shape[:-1], -1)
        expected = reference(rows, GGMLQuantizationType[info.quantization])
        assert np.array_equal(dequantize(file.raw(info.name), info.quantization, info.shape).numpy(), expected)


def test_a_tensor_can_be_written_to_without_touching_the_file(smollm2_path):
    file = GGUFFile(smollm2_path)
    info = file.tensors["output_norm.weight"]
    before = file.raw(info.name).tobytes()
    dequantize(file.raw(info.name), info.quantization, info.shape).zero_()
    assert file.raw(info.name).tobytes() == before
