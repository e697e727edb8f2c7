"""Which tensors a decoder of a given shape has, under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from treadle.runtime.errors import CorruptModelError
from treadle.runtime.models.config import ModelConfig

Shape = tuple[int, ...]


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Every tensor of a model and its shape, `[out_features, in_features]` for matrices.

    `lm_head.weight` is left out where the embeddings are tied. The iterator is lazy, so that a header that claims a
    billion layers costs nothing before the first missing tensor shows it up.
    """
    yield "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
    for layer in range(config.num_layers):
        for name, shape in _layer_shapes(config):
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (config.hidden_size,)
    if not config.tied_embeddings:
        yield "lm_head.weight", (config.vocab_size, config.hidden_size)


def _layer_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears: list[tuple[str, int, int, bool]] = [
        ("self_attn.q_proj", q_size, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv_size, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv_size, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, q_size, config.o_bias),
        ("mlp.gate_proj", intermediate, hidden, config.mlp_bias),
        ("mlp.up_proj", intermediate, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, intermediate, config.mlp_bias),
    ]
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    if config.qk_norm:
        yield "self_attn.q_norm.weight", (config.head_dim,)
        yield "self_attn.k_norm.weight", (config.head_dim,)
    for name, out_features, in_features, has_bias in linears:
        yield f"{name}.weight", (out_features, in_features)
        if has_bias:
            yield f"{name}.bias", (out_features,)


def check_tensors(
    config: ModelConfig,
    stored: Mapping[str, Shape],
    source: str,
    stored_name: Callable[[str], str] = str,
) -> dict[str, Shape]:
    """The tensors that `config` needs, once each is known to be stored with the right shape.

    `stored` maps the names used by the file, which `stored_name` makes of Hugging Face names, to shapes. Raises
    `CorruptModelError`, naming `source` and the first tensor that is absent or has another shape.
    """
    needed: dict[str, Shape] = {}
    for name, shape in tensor_shapes(config):
        found = stored.get(stored_name(name))
        if found is None:
            raise CorruptModelError(
                f"{source}: tensor {stored_name(name)!r} is missing, though the model's configuration needs it. "
                "The file is incomplete or its configuration belongs to another model: get both again."
            )
        if found != shape:
            raise CorruptModelError(
                f"{source}: tensor {stored_name(name)!r} has shape {list(found)}, but by the model's configuration it "
                f"should be {list(shape)}. The weights and the configuration do not belong together: get both again."
            )
        needed[name] = shape
    return needed
