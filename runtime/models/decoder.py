"""The decoder of the Llama family: Llama, Mistral, Qwen2, Qwen2.5 and Qwen3 by configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.kernels.native import Native
from treadle.kernels.native_layers import NativeLayers
from treadle.kernels.ops import REFERENCE, Ops
from treadle.runtime.models.checkpoint import Checkpoint
from treadle.runtime.models.config import ModelConfig, Weights
from treadle.runtime.models.rope import Rope
from treadle.runtime.models.weights import Projection, WeightReader


class Attention(Protocol):
    """How a step's queries meet the paged context: all that the decoder knows of pages."""

    positions: Tensor
    """`[T]` positions of the step's tokens in their calls."""
    places: Tensor
    """`[T]`, where the keys and values of the step's tokens go."""

    def cache(self, layer: int) -> Tensor:
        """Keys and values of a layer, `[2, P, S, K, D]`."""
        ...

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        """Attends with `[T, H, D]` queries, when the step's keys and values are in the cache. Returns `[T, H, D]`."""
        ...


@runtime_checkable
class LayersAttention(Protocol):
    """The same where all layers are one operation."""

    positions: Tensor

    def run(self, layers: NativeLayers, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What the last layer adds, and what it is added to, of `[T, hidden_size]` embeddings."""
        ...


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer. Query, key and value projections are one matrix, and so are gate and up.

    `gated` is the product with the latter, its gates applied.
    """

    attention_norm: Tensor
    qkv: Projection
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Projection
    mlp_norm: Tensor
    gated: Projection
    down: Projection


class Decoder:
    """Turns token ids into logits. Weights stay as they are; keys and values live behind `Attention`.

    `native_layers` are all layers as one operation, where `native.c` computes: `forward` then takes `LayersAttention`.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        layers: list[Layer],
        norm: Tensor,
        head: Projection,
        ops: Ops,
        native_layers: NativeLayers | None = None,
    ) -> None:
        self.config = config
        self.dtype = embedding.dtype
        self.device = embedding.device
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._ops = ops
        self._rope = Rope(config, self.device)
        self.native_layers = native_layers

    def forward(self, token_ids: Tensor, attention: Attention | LayersAttention, wanted: Tensor) -> Tensor:
        """Runs a step.

        Args:
            token_ids: `[T]`.
            attention: Where keys, values and contexts are.
            wanted: `[R]`, the tokens whose logits are wanted.

        Returns:
            Logits `[R, vocab_size]` in float32.
        """
        angles = self._rope.angles(attention.positions, self.dtype)
        x = F.embedding(token_ids, self._embedding)
        if isinstance(attention, LayersAttention):
            assert self.native_layers is not None
            h, x = attention.run(self.native_layers, x, angles)
        else:
            h, x = self._run(x, angles, attention)
        h, _ = self._ops.add_rms_norm(h[wanted], x[wanted], self._norm, self.config.rms_norm_eps)
        return self._head(h)

    def _run(self, x: Tensor, angles: tuple[Tensor, Tensor], attention: Attention) -> tuple[Tensor, Tensor]:
        """What the last layer adds, and what it is added to."""
        ops, eps = self._ops, self.config.rms_norm_eps
        h = ops.rms_norm(x, self._layers[0].attention_norm, eps)
        for index, layer in enumerate(self._layers):
            h, x = ops.add_rms_norm(self._attend(index, layer, h, angles, attention), x, layer.mlp_norm, eps)
            h = layer.down(layer.gated(h))
            if index + 1 < len(self._layers):
                h, x = ops.add_rms_norm(h, x, self._layers[index + 1].attention_norm, eps)
        return h, x

    def _attend(
        self, index: int, layer: Layer, h: Tensor, angles: tuple[Tensor, Tensor], attention: Attention
    ) -> Tensor:
        config = self.config
        qkv = layer.qkv(h).view(len(h), -1, config.head_dim)
        q = self._ops.norm_rope_write(
            qkv, layer.q_norm, layer.k_norm, config.rms_norm_eps, *angles, attention.cache(index), attention.places
        )
        return layer.o(attention(index, q).reshape(len(h), -1))


def load_decoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    ops: Ops = REFERENCE,
    weights: Weights = "auto",
    packed_weights: bool = True,
    native: Native | None = None,
) -> Decoder:
    """Reads all weights of a checkpoint into a decoder.

    Args:
        checkpoint: What is read.
        dtype: Of the weights that are not in codes, and of everything computed.
        device: Where the decoder is.
        ops: What it computes with there.
        weights: Which matrices of the layers are kept in codes.
        packed_weights: Keep the others in the layout that the processor multiplies fastest, where there is one.
        native: What computes the layers and the head, instead of `ops`.

    Raises `CorruptModelError` for what is missing or damaged, `InvalidRequestError` for what cannot be in codes.
    """
    config = checkpoint.config
    reader = WeightReader(checkpoint, dtype, device, weights, packed=packed_weights, swiglu=ops.swiglu, native=native)

    def layer(prefix: str) -> Layer:
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return Layer(
            attention_norm=reader.tensor(f"{prefix}.input_layernorm.weight"),
            qkv=reader.projection(*(f"{attention}.{x}_proj" for x in "qkv"), bias=config.qkv_bias),
            q_norm=reader.tensor(f"{attention}.q_norm.weight") if config.qk_norm else None,
            k_norm=reader.tensor(f"{attention}.k_norm.weight") if config.qk_norm else None,
            o=reader.projection(f"{attention}.o_proj", bias=config.o_bias),
            mlp_norm=reader.tensor(f"{prefix}.post_attention_layernorm.weight"),
            gated=reader.gated(f"{mlp}.gate_proj", f"{mlp}.up_proj", bias=config.mlp_bias),
            down=reader.projection(f"{mlp}.down_proj", bias=config.mlp_bias),
        )

    embedding = reader.tensor("model.embed_tokens.weight")
    layers = [layer(f"model.layers.{index}") for index in range(config.num_layers)]
    name = "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"
    head = reader.head(name, embedding if config.tied_embeddings else None)
    norm = reader.tensor("model.norm.weight")
    fused = NativeLayers(native, layers, config.num_heads, config.rms_norm_eps) if native is not None else None
    return Decoder(config, embedding, layers, norm, head, ops, fused)
