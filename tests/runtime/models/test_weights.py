"""A checkpoint's matrices as products: which of them are in 4 bits, and that it is the same product."""

import dataclasses

import pytest
import torch

from treadle.kernels.int4 import FEW_ROWS, Int4Linear, can_multiply_int4
from treadle.kernels.linear import Linear
from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.models.gguf import GGUFCheckpoint
from treadle.runtime.models.random_weights import SHAPES, RandomCheckpoint
from treadle.runtime.models.weights import WeightReader

CPU = torch.device("cpu")
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
QKV = [f"{ATTENTION}.{x}_proj" for x in "qkv"]
needs_int4 = pytest.mark.skipif(
    not can_multiply_int4(CPU, torch.bfloat16), reason="this processor has no product with 4-bit weights"
)


def tiny(name="tiny-llama", **changes):
    return RandomCheckpoint(dataclasses.replace(SHAPES[name], rope_scaling=None, **changes))


def reader(checkpoint, weights="auto", dtype=torch.bfloat16):
    return WeightReader(checkpoint, dtype, CPU, weights, packed=True)


def inputs(tokens, size):
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(0)).bfloat16()


class PartlyInt4:
    """A checkpoint with one matrix that is not in 4 bits."""

    def __init__(self, checkpoint, name):
        self.config, self.tensor = checkpoint.config, checkpoint.tensor
        self.codes = lambda asked: None if asked == name else checkpoint.codes(asked)


@needs_int4
@pytest.mark.parametrize("tokens", [1, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("weights", ["auto", "int4", "int4-only"])
@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen2.5"])
def test_fused_matrices_of_a_4_bit_file_are_multiplied_in_4_bits(
    shape, quantization, weights, tokens, write_gguf, tmp_path
):
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tiny(shape), quantization))
    bias = checkpoint.config.qkv_bias
    product, x = reader(checkpoint, weights).projection(*QKV, bias=bias), inputs(tokens, 64)
    matrix = torch.cat([checkpoint.tensor(f"{name}.weight") for name in QKV]).double()
    exact = x.double() @ matrix.T
    if bias:
        exact += torch.cat([checkpoint.tensor(f"{name}.bias") for name in QKV]).double()
    assert isinstance(product, Int4Linear)
    assert float((product(x).double() - exact).norm() / exact.norm()) < 2**-8


@needs_int4
def test_matrices_of_one_product_that_are_not_all_in_4_bits_stay_as_they_are(write_gguf, tmp_path):
    file = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tiny(), "Q4_0"))
    mixed, x = PartlyInt4(file, f"{QKV[2]}.weight"), inputs(3, 64)
    product = reader(mixed).projection(*QKV, bias=False)
    assert isinstance(product, Linear)
    assert torch.equal(product(x), reader(file, "full").projection(*QKV, bias=False)(x))
    assert isinstance(reader(mixed, "int4").projection(*QKV, bias=False), Int4Linear)
    assert isinstance(reader(mixed).projection(f"{ATTENTION}.o_proj", bias=False), Int4Linear)


@needs_int4
def test_what_is_not_in_4_bits_is_rounded_on_request_only():
    assert isinstance(reader(tiny()).projection(*QKV, bias=False), Linear)
    full, x = reader(tiny(), "full").projection(*QKV, bias=False), inputs(4, 64)
    rounded = reader(tiny(), "int4").projection(*QKV, bias=False)
    assert float((rounded(x) - full(x)).norm() / full(x).norm()) < 0.1


@needs_int4
def test_both_forms_of_a_rounded_matrix_are_of_the_same_weights():
    product, x = reader(tiny(), "int4").projection(*QKV, bias=False), inputs(FEW_ROWS + 1, 64)
    few, more = product(x[:FEW_ROWS]), product(x)[:FEW_ROWS]
    assert float((few - more).norm() / more.norm()) < 2**-7


@needs_int4
@pytest.mark.parametrize(
    ("changes", "names", "shape"),
    [
        ({"intermediate_size": 200}, [f"{MLP}.down_proj"], "64 rows of 200"),
        ({"intermediate_size": 100}, [f"{MLP}.gate_proj", f"{MLP}.up_proj"], "200 rows of 64"),
    ],
)
def test_shapes_that_have_no_product_are_refused_or_stay_as_they_are(changes, names, shape):
    checkpoint = tiny(**changes)
    assert isinstance(reader(checkpoint).projection(*names, bias=False), Linear)
    with pytest.raises(InvalidRequestError, match=f"{names[-1]}.weight have {shape}, and 4 bits need multiples of 16"):
        reader(checkpoint, "int4").projection(*names, bias=False)


@pytest.mark.parametrize("weights", ["auto", "full"])
def test_float32_is_exact_whatever_the_file(weights, write_gguf, tmp_path):
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tiny(), "Q4_1"))
    product = reader(checkpoint, weights, torch.float32).projection(f"{ATTENTION}.o_proj", bias=False)
    x = inputs(3, 64).float()
    assert torch.equal(product(x), x @ checkpoint.tensor(f"{ATTENTION}.o_proj.weight").T)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("meta", torch.bfloat16)])
def test_4_bits_where_there_is_no_product_are_refused(device, dtype):
    with pytest.raises(InvalidRequestError, match=f"on this {device}; use weights='auto'"):
        WeightReader(tiny(), dtype, torch.device(device), "int4", packed=True)
