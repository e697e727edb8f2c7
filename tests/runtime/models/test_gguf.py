"""A GGUF file as a checkpoint: Hugging Face names, Hugging Face layout, the right shape."""

import contextlib
import dataclasses
import struct
import time

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, RopeScalingType
from gguf.quants import dequantize as reference
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from treadle.kernels.codes import Int4Matrix, Int8Matrix
from treadle.runtime.errors import CorruptModelError, UnsupportedModelError
from treadle.runtime.models.config import RopeScaling
from treadle.runtime.models.gguf import GGUFCheckpoint, unpermute
from treadle.runtime.models.random_weights import SHAPES, RandomCheckpoint

TINY = ["tiny-llama", "tiny-mistral", "tiny-qwen2.5", "tiny-qwen3"]


def tiny(name: str, **changes) -> RandomCheckpoint:
    """A tiny model without the rotary scaling that a GGUF header has no words for."""
    return RandomCheckpoint(dataclasses.replace(SHAPES[name], rope_scaling=None, **changes))


def assert_same_weights(checkpoint, expected):
    assert set(checkpoint.names()) == set(expected.names())
    for name in expected.names():
        assert torch.equal(checkpoint.tensor(name), expected.tensor(name)), name


@pytest.mark.parametrize("name", TINY)
def test_what_was_converted_comes_back_the_same(name, write_gguf, tmp_path):
    original = tiny(name)
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", original))
    assert_same_weights(checkpoint, original)
    architecture = "llama" if name == "tiny-mistral" else original.config.architecture
    eps = float(np.float32(original.config.rms_norm_eps))
    assert checkpoint.config == dataclasses.replace(original.config, architecture=architecture, rms_norm_eps=eps)


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_matrices_are_what_the_gguf_package_makes_of_them(quantization, write_gguf, tmp_path):
    original, kind = tiny("tiny-qwen3"), GGMLQuantizationType[quantization]
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", original, quantization))
    for name in original.names():
        weights = original.tensor(name).numpy()
        expected = weights if weights.ndim == 1 else reference(quantize(weights, kind), kind)
        assert np.array_equal(checkpoint.tensor(name).numpy(), expected), name


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q8_0", "F32"])
def test_matrices_in_4_or_8_bits_come_as_codes_too(quantization, shape, write_gguf, tmp_path):
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tiny(shape), quantization))
    for name in checkpoint.names():
        weights, codes = checkpoint.tensor(name), checkpoint.codes(name)
        if weights.ndim == 1 or quantization == "F32":
            assert codes is None
            continue
        assert isinstance(codes, Int8Matrix if quantization == "Q8_0" else Int4Matrix)
        assert int(codes.codes.max()) <= (127 if quantization == "Q8_0" else 15)
        assert torch.equal(codes.dequantize(), weights)


def test_the_matrices_of_the_real_model_are_in_4_bits_and_its_embedding_in_8(smollm2_path):
    checkpoint = GGUFCheckpoint(smollm2_path)
    in_4_bits = {name for name in checkpoint.names() if isinstance(checkpoint.codes(name), Int4Matrix)}
    assert in_4_bits == {name for name in checkpoint.names() if name.endswith("_proj.weight")}
    assert isinstance(checkpoint.codes("model.embed_tokens.weight"), Int8Matrix)


def test_codes_of_a_tensor_that_was_never_there_are_an_error(smollm2_path):
    with pytest.raises(CorruptModelError, match=r"no tensor 'lm_head\.weight'"):
        GGUFCheckpoint(smollm2_path).codes("lm_head.weight")


@pytest.mark.parametrize("name", TINY)
def test_transformers_loads_the_same_weights(name, write_gguf, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny(name), "Q8_0")
    checkpoint = GGUFCheckpoint(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path, gguf_file=path.name))
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    assert set(theirs) == set(checkpoint.names())
    for tensor_name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(tensor_name), theirs[tensor_name]), tensor_name


def test_biases_of_llama_are_put_back_in_order_too(write_gguf, tmp_path):
    original = tiny("tiny-llama", qkv_bias=True, o_bias=True, mlp_bias=True)
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", original))
    assert (checkpoint.config.qkv_bias, checkpoint.config.o_bias, checkpoint.config.mlp_bias) == (True, True, True)
    assert_same_weights(checkpoint, original)


def test_unpermute_moves_pairs_to_halves():
    assert unpermute(torch.tensor([0, 2, 1, 3, 4, 6, 5, 7]), num_heads=2).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_the_real_model_has_the_shape_it_is_known_for(smollm2_path):
    config = GGUFCheckpoint(smollm2_path).config
    assert dataclasses.replace(config, rms_norm_eps=1e-5) == SHAPES["smollm2-135m"]
    assert config.rms_norm_eps == pytest.approx(1e-5)


def test_all_weights_of_the_real_model_are_read(smollm2_path):
    checkpoint = GGUFCheckpoint(smollm2_path)
    num_weights = sum(checkpoint.tensor(name).numel() for name in checkpoint.names())
    assert num_weights == 134_515_008


def test_embeddings_are_tied_where_there_is_no_output_matrix(write_gguf, tmp_path):
    original = tiny("tiny-llama")
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", original, without=["lm_head.weight"]))
    assert checkpoint.config.tied_embeddings
    assert "lm_head.weight" not in checkpoint.names()


def test_frequency_factors_become_rope_scaling(write_gguf, tmp_path):
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", tiny("tiny-llama"), extra_tensors=[("rope_freqs.weight", factors)])
    scaling = GGUFCheckpoint(path).config.rope_scaling
    assert scaling == RopeScaling("factors", factors=tuple(factors.tolist()))


def test_linear_scaling_is_read(write_gguf, tmp_path):
    metadata = [("add_rope_scaling_type", RopeScalingType.LINEAR), ("add_rope_scaling_factor", 4.0)]
    path = write_gguf(tmp_path / "m.gguf", tiny("tiny-llama"), metadata=metadata)
    assert GGUFCheckpoint(path).config.rope_scaling == RopeScaling("linear", factor=4.0)


def test_yarn_is_read_and_lengthens_the_context(write_gguf, tmp_path):
    metadata = [
        ("add_rope_scaling_type", RopeScalingType.YARN),
        ("add_rope_scaling_factor", 4.0),
        ("add_rope_scaling_orig_ctx_len", 2048),
        ("add_rope_scaling_yarn_beta_fast", 16.0),
    ]
    config = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tiny("tiny-qwen2.5"), metadata=metadata)).config
    assert config.rope_scaling == RopeScaling("yarn", factor=4.0, original_context=2048, beta_fast=16.0)
    assert config.max_context == 8192


def test_a_sliding_window_is_kept_where_it_is_shorter_than_the_context(write_gguf, tmp_path):
    for window, expected in ((256, 256), (2048, None)):
        path = write_gguf(tmp_path / f"{window}.gguf", tiny("tiny-mistral"), metadata=[("add_sliding_window", window)])
        assert GGUFCheckpoint(path).config.sliding_window == expected


UNSUPPORTED = {
    "mixture of experts": [("add_expert_count", 8)],
    "one of 3 parts": [("add_uint16", "split.count", 3)],
    "a part of each head": [("add_rope_dimension_count", 8)],
    "rotary scaling 'longrope'": [("add_rope_scaling_type", RopeScalingType.LONGROPE)],
    "differs from layer to layer": [("add_head_count_kv", [2, 4])],
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_a_variant_that_would_run_wrongly_is_refused(reason, write_gguf, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny("tiny-llama"), metadata=UNSUPPORTED[reason])
    with pytest.raises(UnsupportedModelError, match=reason):
        GGUFCheckpoint(path)


def test_another_architecture_is_refused_with_those_that_run(write_gguf, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny("tiny-llama", architecture="gemma3"))
    with pytest.raises(UnsupportedModelError, match="architecture 'gemma3'; Treadle runs llama, qwen2, qwen3"):
        GGUFCheckpoint(path)


def test_a_tensor_nobody_knows_is_refused(write_gguf, tmp_path):
    extra = [("blk.0.attn_sinks.weight", np.zeros(4, np.float32))]
    path = write_gguf(tmp_path / "m.gguf", tiny("tiny-llama"), extra_tensors=extra)
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.attn_sinks\.weight"):
        GGUFCheckpoint(path)


def test_a_missing_tensor_is_named(write_gguf, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny("tiny-llama"), without=["model.layers.1.mlp.up_proj.weight"])
    with pytest.raises(CorruptModelError, match=r"'blk\.1\.ffn_up\.weight' is missing"):
        GGUFCheckpoint(path)


def test_a_tensor_of_the_wrong_shape_is_named(write_gguf, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny("tiny-llama"), metadata=[("add_feed_forward_length", 128)])
    with pytest.raises(CorruptModelError, match=r"'blk\.0\.ffn_gate\.weight' has shape \[192, 64\].*\[128, 64\]"):
        GGUFCheckpoint(path)


def test_heads_of_an_odd_size_are_refused(write_gguf, tmp_path):
    metadata = [(f"add_{name}", 15) for name in ("key_length", "value_length", "rope_dimension_count")]
    path = write_gguf(tmp_path / "m.gguf", tiny("tiny-llama"), metadata=metadata)
    with pytest.raises(CorruptModelError, match="heads of 15 dimensions cannot be rotated: the number is odd"):
        GGUFCheckpoint(path)


def test_a_billion_layers_are_refused_at_once(write_gguf, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny("tiny-llama"), metadata=[("add_block_count", 2**31 - 1)])
    start = time.perf_counter()
    with pytest.raises(CorruptModelError, match=r"'blk\.2\."):
        GGUFCheckpoint(path)
    assert time.perf_counter() - start < 1


def test_a_tensor_that_was_never_there_is_an_error(write_gguf, tmp_path):
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tiny("tiny-llama")))
    with pytest.raises(CorruptModelError, match=r"no tensor 'model.layers.9.mlp.up_proj.weight'"):
        checkpoint.tensor("model.layers.9.mlp.up_proj.weight")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory, write_gguf):
    """A whole model of some ten kilobytes, most of them header, for cutting and flipping."""
    config = dataclasses.replace(
        SHAPES["tiny-llama"], rope_scaling=None, vocab_size=32, hidden_size=32, intermediate_size=32, num_layers=1,
        num_heads=2, num_kv_heads=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("small") / "m.gguf"
    words = [f"word{i}" for i in range(32)]
    return write_gguf(path, RandomCheckpoint(config), "Q8_0", metadata=[("add_token_list", words)])


def read_everything(path):
    checkpoint = GGUFCheckpoint(path)
    for name in checkpoint.names():
        checkpoint.tensor(name)


@given(data=st.data())
@settings(max_examples=150, deadline=5000)
def test_a_file_cut_anywhere_is_corrupt(small_file, data):
    whole = small_file.read_bytes()
    cut = small_file.with_name("cut.gguf")
    cut.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 40))])
    with pytest.raises(CorruptModelError):
        read_everything(cut)


@given(data=st.data())
@settings(max_examples=400, deadline=5000)
def test_a_file_with_flipped_bits_loads_or_is_refused(small_file, data):
    damaged = bytearray(small_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, 4000))
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    path = small_file.with_name("damaged.gguf")
    path.write_bytes(damaged)
    with contextlib.suppress(CorruptModelError, UnsupportedModelError):
        read_everything(path)


@given(position=st.integers(8, 4000), value=st.sampled_from([2**31 - 1, 2**32 - 1, 2**60, 2**63, 2**64 - 1]))
@settings(max_examples=300, deadline=5000)
def test_a_file_with_a_giant_number_somewhere_loads_or_is_refused(small_file, position, value):
    damaged = bytearray(small_file.read_bytes())
    struct.pack_into("<Q", damaged, position, value)
    path = small_file.with_name("giant.gguf")
    path.write_bytes(damaged)
    with contextlib.suppress(CorruptModelError, UnsupportedModelError):
        read_everything(path)
