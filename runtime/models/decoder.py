"""The decoder of the Llama family: Llama, Mistral, Qwen2, Qwen2.5 and Qwen3 by configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.kernels import reference as ops
from treadle.kernels.linear import Linear
from treadle.runtime.models.checkpoint import Checkpoint
from treadle.runtime.models.config import ModelConfig, Weights
from treadle.runtime.models.rope import Rope
from treadle.runtime.models.weights import Projection, WeightReader


class Attention(Protocol):
    """How a step's queries meet the paged context: all that the decoder knows of pages."""

    positions: Tensor
    """`[T]` positions of the step's tokens in their calls."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores `[T, K, D]` keys and values, and attends with `[T, H, D]` queries. Returns `[T, H, D]`."""
        ...


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer. Query, key and value projections are one matrix, and so are gate and up."""

    attention_norm: Tensor
    qkv: Projection
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Projection
    mlp_norm: Tensor
    gate_up: Projection
    down: Projection


class Decoder:
    """Turns token ids into logits. Weights stay as they are; keys and values live behind `Attention`."""

    def __init__(self, config: ModelConfig, embedding: Tensor, layers: list[Layer], norm: Tensor, head: Linear) -> None:
        self.config = config
        self.dtype = embedding.dtype
        self.device = embedding.device
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._rope = Rope(config, self.device)

    def forward(self, token_ids: Tensor, attention: Attention, wanted: Tensor) -> Tensor:
        """Runs a step.

        Args:
            token_ids: `[T]`.
            attention: Where keys, values and contexts are.
            wanted: `[R]`, the tokens whose logits are wanted.

        Returns:
            Logits `[R, vocab_size]` in float32.
        """
        eps = self.config.rms_norm_eps
        cos, sin = self._rope.angles(attention.positions, self.dtype)
        x = F.embedding(token_ids, self._embedding)
        for index, layer in enumerate(self._layers):
            h = ops.rms_norm(x, layer.attention_norm, eps)
            x = x + self._attend(index, layer, h, cos, sin, attention)
            h = ops.rms_norm(x, layer.mlp_norm, eps)
            x = x + layer.down(ops.swiglu(layer.gate_up(h)))
        x = ops.rms_norm(x[wanted], self._norm, eps)
        return self._head.in_float32(x)

    def _attend(self, index: int, layer: Layer, h: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        config = self.config
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = layer.qkv(h).view(-1, heads + 2 * kv_heads, size)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = ops.rms_norm(qk[:, :heads], layer.q_norm, config.rms_norm_eps)
            k = ops.rms_norm(qk[:, heads:], layer.k_norm, config.rms_norm_eps)
            qk = torch.cat((q, k), 1)
        qk = ops.apply_rope(qk, cos, sin)
        out = attention(index, qk[:, :heads], qk[:, heads:], v)
        return layer.o(out.reshape(-1, heads * size))


def load_decoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    weights: Weights = "auto",
    packed_weights: bool = True,
) -> Decoder:
    """Reads all weights of a checkpoint into a decoder.

    Args:
        checkpoint: What is read.
        dtype: Of the weights that are not in 4 bits, and of everything computed.
        device: Where the decoder is.
        weights: Which matrices of the layers are kept in 4 bits.
        packed_weights: Keep the others in the layout that the processor multiplies fastest, where there is one.

    Raises `CorruptModelError` for what is missing or damaged, `InvalidRequestError` for what cannot be in 4 bits.
    """
    config = checkpoint.config
    reader = WeightReader(checkpoint, dtype, device, weights, packed=packed_weights)

    def layer(prefix: str) -> Layer:
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return Layer(
            attention_norm=reader.tensor(f"{prefix}.input_layernorm.weight"),
            qkv=reader.projection(*(f"{attention}.{x}_proj" for x in "qkv"), bias=config.qkv_bias),
            q_norm=reader.tensor(f"{attention}.q_norm.weight") if config.qk_norm else None,
            k_norm=reader.tensor(f"{attention}.k_norm.weight") if config.qk_norm else None,
            o=reader.projection(f"{attention}.o_proj", bias=config.o_bias),
            mlp_norm=reader.tensor(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=reader.projection(f"{mlp}.gate_proj", f"{mlp}.up_proj", bias=config.mlp_bias),
            down=reader.projection(f"{mlp}.down_proj", bias=config.mlp_bias),
        )

    embedding = reader.tensor("model.embed_tokens.weight")
    layers = [layer(f"model.layers.{index}") for index in range(config.num_layers)]
    head = embedding if config.tied_embeddings else reader.tensor("lm_head.weight")
    return Decoder(config, embedding, layers, reader.tensor("model.norm.weight"), reader.linear(head))
