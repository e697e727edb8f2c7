"""Random models: the same weights at every call, and outputs of sane size."""

import dataclasses

import pytest
import torch

from treadle.runtime.errors import CorruptModelError
from treadle.runtime.models.random_weights import SHAPES, RandomCheckpoint

TINY = [name for name in SHAPES if name.startswith("tiny-")]


def test_a_tensor_does_not_depend_on_what_was_read_before():
    first, second = (RandomCheckpoint(SHAPES["tiny-llama"], seed=7) for _ in range(2))
    forwards = {name: first.tensor(name) for name in first.names()}
    for name in reversed(list(second.names())):
        assert torch.equal(second.tensor(name), forwards[name])


def test_seeds_and_names_give_different_weights():
    name, other = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    config = SHAPES["tiny-llama"]
    assert not torch.equal(RandomCheckpoint(config, 0).tensor(name), RandomCheckpoint(config, 1).tensor(name))
    assert not torch.equal(RandomCheckpoint(config, 0).tensor(name), RandomCheckpoint(config, 0).tensor(other))


def test_the_weights_of_a_seed_never_change():
    weights = RandomCheckpoint(SHAPES["tiny-llama"], seed=0).tensor("model.embed_tokens.weight")
    assert weights[0, :3].tolist() == pytest.approx(
        [-0.0723658949136734, 0.14236310124397278, 0.005335353780537844], abs=1e-7
    )


def test_matrices_norms_and_biases_have_their_size():
    checkpoint = RandomCheckpoint(SHAPES["tiny-qwen2.5"])
    matrix = checkpoint.tensor("model.layers.0.mlp.down_proj.weight")
    assert matrix.mean().item() == pytest.approx(0, abs=0.005)
    assert matrix.std().item() == pytest.approx(192**-0.5, rel=0.05)
    assert checkpoint.tensor("model.norm.weight").mean().item() == pytest.approx(1, abs=0.02)
    assert 0 < checkpoint.tensor("model.layers.0.self_attn.q_proj.bias").abs().max().item() < 0.05


@pytest.mark.parametrize("name", TINY)
def test_tiny_shapes_are_tiny_and_whole(name):
    config = SHAPES[name]
    checkpoint = RandomCheckpoint(config)
    total = sum(
        checkpoint.tensor(tensor).numel() for tensor in checkpoint.names() if checkpoint.tensor(tensor).ndim == 2
    )
    assert total == config.num_parameters < 250_000
    assert config.num_heads > config.num_kv_heads > 1
    assert ("model.layers.0.self_attn.q_norm.weight" in checkpoint.names()) == config.qk_norm
    assert ("model.layers.0.self_attn.q_proj.bias" in checkpoint.names()) == config.qkv_bias
    assert ("lm_head.weight" in checkpoint.names()) == (not config.tied_embeddings)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.1-8b", 8.03),
        ("llama-3.2-1b", 1.236),
        ("mistral-7b-v0.3", 7.25),
        ("qwen2.5-0.5b", 0.494),
        ("qwen3-0.6b", 0.596),
        ("qwen3-8b", 8.19),
        ("smollm2-135m", 0.1345),
    ],
)
def test_named_shapes_have_the_published_number_of_parameters(name, billions):
    assert SHAPES[name].num_parameters / 1e9 == pytest.approx(billions, rel=2e-3)


def test_a_tensor_that_was_never_there_is_an_error():
    with pytest.raises(CorruptModelError, match=r"no tensor 'lm_head\.weight'"):
        RandomCheckpoint(dataclasses.replace(SHAPES["tiny-llama"], tied_embeddings=True)).tensor("lm_head.weight")
