"""All layers of a decoder as one operation, so that nothing stands between what they compute."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from torch import Tensor

from treadle.kernels.native import TILE_ROWS, Contexts, LayerWeights, Native, Pass
from treadle.kernels.native_linear import NativeLinear

Product: TypeAlias = Callable[[Tensor], Tensor]


class NativeLayer(Protocol):
    """The weights of one layer. The products are `NativeLinear`s."""

    @property
    def attention_norm(self) -> Tensor: ...
    @property
    def qkv(self) -> Product: ...
    @property
    def q_norm(self) -> Tensor | None: ...
    @property
    def k_norm(self) -> Tensor | None: ...
    @property
    def o(self) -> Product: ...
    @property
    def mlp_norm(self) -> Tensor: ...
    @property
    def gated(self) -> Product: ...
    @property
    def down(self) -> Product: ...


class NativeLayers:
    """The layers of a decoder; what they compute is what their operations would compute one by one.

    Args:
        native: The operations.
        layers: Their weights.
        heads: Query heads.
        eps: Of the norms.
    """

    def __init__(self, native: Native, layers: Sequence[NativeLayer], heads: int, eps: float) -> None:
        self._native = native
        self._kept = layers  # whose addresses stand in the array below
        self._gated_width = _native(layers[0].gated).out_features
        self._heads = heads
        self._eps = eps
        self._layers = (LayerWeights * len(layers))(*map(_addresses, layers))

    def __call__(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        kv: Tensor,
        places: Tensor,
        page_table: Tensor,
        runs: Tensor,
        tasks: Tensor,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Runs a step.

        Args:
            x: `[T, N]` embeddings; written over.
            angles: Cosines and sines, `[T, 1, D]` each.
            kv: `[layers, 2, P, S, K, D]`.
            places: `[T]`, where the keys and values of the step's tokens go.
            page_table, runs, tasks, window: As `Contexts.of` takes them.

        Returns:
            What the last layer adds, and what it is added to.
        """
        tokens, hidden = x.shape
        kv_heads, head_dim = kv.shape[4:]
        heads = self._heads * head_dim
        padded = -(-tokens // TILE_ROWS) * TILE_ROWS
        added, qkv, q = (x.new_empty(tokens, width) for width in (hidden, heads + 2 * kv_heads * head_dim, heads))
        h, attended, gated = (x.new_empty(padded, width) for width in (hidden, heads, self._gated_width))
        cos, sin = angles
        step = Pass(
            *(tokens, hidden, self._eps, cos.data_ptr(), sin.data_ptr(), places.data_ptr()),
            *(kv.data_ptr(), kv.stride(0), kv.stride(1)),
            *(tensor.data_ptr() for tensor in (x, added, h, qkv, q, attended, gated)),
        )
        self._native.layers(self._layers, step, Contexts.of(kv[0], self._heads, page_table, runs, tasks, window))
        return added, x


def _addresses(layer: NativeLayer) -> LayerWeights:
    def of(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    return LayerWeights(
        *(of(layer.attention_norm), of(layer.q_norm), of(layer.k_norm), of(layer.mlp_norm)),
        *(ctypes.addressof(_native(product).weight) for product in (layer.qkv, layer.o, layer.gated, layer.down)),
    )


def _native(product: Product) -> NativeLinear:
    assert isinstance(product, NativeLinear)
    return product
