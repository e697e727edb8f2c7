"""Matrix products with a model's weights, laid out for the processor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
            return packed_linear(x, self._weight, self._bias)
        return F.linear(x, self._weight, self._bias)


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


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product with a packed weight, rounded to bfloat16."""
    # NOTE: torch.compile's own way to oneDNN; torch has no public function that takes a packed weight.
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
