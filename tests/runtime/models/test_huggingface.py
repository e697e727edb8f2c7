"""A folder in the Hugging Face format as a checkpoint; transformers writes the folders."""

import contextlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from treadle.runtime.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from treadle.runtime.models.config import RopeScaling
from treadle.runtime.models.huggingface import HuggingFaceCheckpoint
from treadle.runtime.models.huggingface_config import read_config

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}


def save_model(folder, config, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, **options)
    return model


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path, CONFIGS["llama"])
    return tmp_path


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20kB"}], ids=["single", "sharded"])
def test_what_transformers_saves_is_read_the_same(kind, options, tmp_path):
    model = save_model(tmp_path, CONFIGS[kind], **options)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(options)
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    expected = dict(model.named_parameters())
    assert set(checkpoint.names()) == set(expected)
    for name in expected:
        assert torch.equal(checkpoint.tensor(name), expected[name]), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_shape_is_that_of_the_configuration(kind, tmp_path):
    theirs = CONFIGS[kind]
    theirs.save_pretrained(tmp_path)
    change_config(tmp_path, architectures=None)
    ours = read_config(tmp_path)
    assert ours.architecture == theirs.model_type
    assert (ours.vocab_size, ours.hidden_size, ours.intermediate_size, ours.num_layers) == (96, 32, 48, 2)
    assert (ours.num_heads, ours.num_kv_heads, ours.max_context) == (4, 2, 1024)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.rope_scaling, ours.sliding_window) == (None, None)
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.qk_norm == (kind == "qwen3")
    assert (ours.qkv_bias, ours.o_bias, ours.mlp_bias) == {
        "qwen2": (True, False, False),
        "llama with biases": (True, True, True),
    }.get(kind, (False, False, False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_keep_their_element_type(dtype, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS["qwen3"], dtype=dtype).save_pretrained(tmp_path)
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    assert {checkpoint.tensor(name).dtype for name in checkpoint.names()} == {dtype}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 512}
ROPE = {
    "linear, as older models write it": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        RopeScaling("linear", 2.0),
    ),
    "llama3": ({"rope_scaling": LLAMA3}, RopeScaling("llama3", 8.0, 512, 1.0, 4.0)),
    "llama3 in rope_parameters": ({"rope_parameters": LLAMA3}, RopeScaling("llama3", 8.0, 512, 1.0, 4.0)),
    "yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 16}},
        RopeScaling("yarn", 4.0, 1024, beta_fast=16.0),
    ),
    "yarn with a magnitude": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.5}},
        RopeScaling("yarn", 4.0, 1024, attention_factor=1.5),
    ),
    "none": ({"rope_scaling": None, "rope_parameters": {"rope_type": "default"}}, None),
}


@pytest.mark.parametrize("kind", ROPE)
def test_rotary_scaling_is_read(kind, folder):
    change_config(folder, rope_parameters=None)
    changes, expected = ROPE[kind]
    change_config(folder, **changes)
    config = read_config(folder)
    assert config.rope_scaling == expected
    assert config.max_context == (4096 if kind.startswith("yarn") else 1024)


def test_the_rotary_base_is_read_from_either_place(folder):
    change_config(folder, rope_theta=5e5, rope_parameters=None)
    assert read_config(folder).rope_theta == 5e5
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert read_config(folder).rope_theta == 1e6


WINDOWS = [
    ("mistral", {"sliding_window": 256}, 256),
    ("mistral", {"sliding_window": 1024}, None),
    ("mistral", {"sliding_window": None}, None),
    ("qwen2", {"sliding_window": 256, "use_sliding_window": False}, None),
    ("qwen2", {"sliding_window": 256, "use_sliding_window": True, "max_window_layers": 0}, 256),
    ("qwen2", {"sliding_window": 256, "use_sliding_window": True, "max_window_layers": 2}, None),
    ("llama", {"sliding_window": 256}, None),
]


@pytest.mark.parametrize(("kind", "changes", "expected"), WINDOWS)
def test_a_sliding_window_counts_only_where_it_is_in_use(kind, changes, expected, tmp_path):
    CONFIGS[kind].save_pretrained(tmp_path)
    change_config(tmp_path, layer_types=None, **changes)
    assert read_config(tmp_path).sliding_window == expected


UNSUPPORTED = {
    "model type 'gemma3'.*LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3": {"model_type": "gemma3"},
    "LlamaForSequenceClassification": {"architectures": ["LlamaForSequenceClassification"]},
    "activation 'gelu'": {"hidden_act": "gelu"},
    "quantised": {"quantization_config": {"quant_method": "gptq"}},
    "a part of each head": {"partial_rotary_factor": 0.5},
    "rotary scaling 'dynamic'": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_a_variant_that_would_run_wrongly_is_refused(reason, folder):
    change_config(folder, **UNSUPPORTED[reason])
    with pytest.raises(UnsupportedModelError, match=reason):
        HuggingFaceCheckpoint(folder)


def test_a_window_in_some_layers_only_is_refused(tmp_path):
    CONFIGS["qwen2"].save_pretrained(tmp_path)
    change_config(tmp_path, layer_types=["full_attention", "sliding_attention"])
    change_config(tmp_path, sliding_window=8, use_sliding_window=True)
    with pytest.raises(UnsupportedModelError, match="in some layers only"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"head_dim": 7}, "heads of 7 dimensions cannot be rotated: the number is odd"),
        ({"head_dim": 16}, r"q_proj\.weight' has shape \[32, 32\].*\[64, 32\]"),
        ({"vocab_size": 97}, r"embed_tokens\.weight' has shape \[96, 32\].*\[97, 32\]"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_parameters": [1]}, "rope_parameters is"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"intermediate_size": 64}, r"mlp\.gate_proj\.weight' has shape \[48, 32\].*\[64, 32\]"),
        ({"num_hidden_layers": 2**31 - 1}, r"model\.layers\.2\..*is missing"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(changes, reason, folder):
    change_config(folder, **changes)
    with pytest.raises(CorruptModelError, match=reason):
        HuggingFaceCheckpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_a_configuration_that_is_no_json_object_is_refused(text, folder):
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CorruptModelError, match=r"config\.json: not"):
        HuggingFaceCheckpoint(folder)


def test_missing_files_are_named(folder, tmp_path_factory):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"no model\.safetensors"):
        HuggingFaceCheckpoint(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(UnsupportedModelError, match="pickled"):
        HuggingFaceCheckpoint(folder)
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        HuggingFaceCheckpoint(tmp_path_factory.mktemp("empty"))


def test_a_missing_tensor_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CorruptModelError, match=r"'model\.norm\.weight' is missing"):
        HuggingFaceCheckpoint(folder)


def test_a_tensor_nobody_knows_is_refused(folder):
    weights = load_file(folder / "model.safetensors") | {"model.layers.0.self_attn.sinks": torch.zeros(4)}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.self_attn\.sinks"):
        HuggingFaceCheckpoint(folder)


def test_another_element_type_is_refused(folder):
    weights = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        UnsupportedModelError, match=r"F8_E4M3, which Treadle cannot run\. Use a model in F32, F16, BF16"
    ):
        HuggingFaceCheckpoint(folder)


def test_a_tied_model_may_store_its_output_matrix_too(tmp_path):
    save_model(tmp_path, CONFIGS["qwen2"])
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    assert "lm_head.weight" not in HuggingFaceCheckpoint(tmp_path).names()


@pytest.fixture
def sharded(tmp_path):
    save_model(tmp_path, CONFIGS["llama"], max_shard_size="20kB")
    return tmp_path


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CorruptModelError, match=f"{shard.name}: this part of the model is missing"):
        HuggingFaceCheckpoint(sharded)


def test_a_shard_without_its_tensor_is_named(sharded):
    first = sorted(sharded.glob("model-*.safetensors"))[0].name
    change_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": first}))
    with pytest.raises(CorruptModelError, match=r"'model\.norm\.weight' should be in this file"):
        HuggingFaceCheckpoint(sharded)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", ""])
def test_an_index_that_leads_out_of_the_folder_is_refused(shard, sharded):
    change_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": shard}))
    with pytest.raises(CorruptModelError, match="not a file of this folder"):
        HuggingFaceCheckpoint(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": null}'])
def test_an_index_that_is_none_is_refused(text, sharded):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptModelError, match="not a safetensors index"):
        HuggingFaceCheckpoint(sharded)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    save_model(folder, CONFIGS["llama"])
    return folder, (folder / "model.safetensors").read_bytes()


@given(data=st.data())
@settings(max_examples=100, deadline=5000)
def test_a_file_cut_anywhere_is_corrupt(small_folder, data):
    folder, whole = small_folder
    (folder / "model.safetensors").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CorruptModelError, match=r"model\.safetensors: truncated or damaged"):
        HuggingFaceCheckpoint(folder)


@given(data=st.data())
@settings(max_examples=200, deadline=5000)
def test_a_file_with_flipped_bits_loads_or_is_refused(small_folder, data):
    folder, whole = small_folder
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, 2500))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "model.safetensors").write_bytes(damaged)
    with contextlib.suppress(CorruptModelError, UnsupportedModelError):
        checkpoint = HuggingFaceCheckpoint(folder)
        for name in checkpoint.names():
            checkpoint.tensor(name)


def test_a_tensor_that_was_never_there_is_an_error(folder):
    with pytest.raises(CorruptModelError, match=r"no tensor 'model\.layers\.9\.mlp"):
        HuggingFaceCheckpoint(folder).tensor("model.layers.9.mlp.up_proj.weight")
