"""Matrix products with a model's weights: laid out for the processor, and exact where the best of many is chosen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

UPCAST_ROWS = 1024
"""Rows of a weight that are float32 at a time, where a product needs them so: they should stay in the cache."""
PACKED_FOR_BATCH = 16
"""The batch size that oneDNN lays packed weights out for; other sizes use the same layout."""


class Linear:
    """`x @ weight.T + bias` for `[T, in]` inputs.

    Args:
        weight: `[out, in]`.
        bias: `[out]`.
        packed: Keep the weight in oneDNN's blocked layout, and only there, where the processor gains by it. Decoding
            reads every weight once a step, and so laid out it reads them almost twice as fast.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, packed: bool = True) -> None:
        self._packed = packed and can_pack(weight.device, weight.dtype)
        self._weight = pack(weight) if self._packed else weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, out]` in the type of `x`."""
        if self._packed:
            return _packed_linear(x, self._weight, self._bias)
        return F.linear(x, self._weight, self._bias)

    def in_float32(self, x: Tensor) -> Tensor:
        """`[T, out]` in float32, not rounded to the type of `x` before; without the bias.

        A bfloat16 product has 8 significant bits: of 49,152 logits near 20 the two best are often equal, and which of
        them is taken depends on sums in another order, and so on what happened to be cached.
        """
        if self._packed:
            return self._with_remainder(x)
        if x.dtype == torch.float32:
            return F.linear(x, self._weight)
        if x.is_cuda:
            return torch.mm(x, self._weight.t(), out_dtype=torch.float32)
        return torch.cat([F.linear(x.float(), rows.float()) for rows in torch.split(self._weight, UPCAST_ROWS)], -1)

    def _with_remainder(self, x: Tensor) -> Tensor:
        """The rounded product, and what the rounding took away: oneDNN sums in float32, and rounds only its result.

        Exact to 16 bits, and cheaper than a float32 product: the second time the weight is warm in the cache.
        """
        rounded = _packed_linear(x, self._weight, None)
        error: Tensor = torch.ops.mkldnn._linear_pointwise.binary(-x, rounded, self._weight, None, "add")
        return rounded.float().sub_(error)


def pack(weight: Tensor) -> Tensor:
    """A weight in oneDNN's layout. Nothing but oneDNN's own products can read it."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_BATCH)
    return packed


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of a device and type gain by packing: bfloat16 on processors that multiply it."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # NOTE: torch.compile's own way to oneDNN; torch has no public function that takes a packed weight.
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
