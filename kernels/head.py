"""From hidden states to logits: exact where the best of many is chosen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.kernels.int4 import FEW_ROWS, Int4Linear, Int4Matrix, fits_int4
from treadle.kernels.linear import can_pack, pack, packed_linear

UPCAST_ROWS = 1024
"""Rows of a weight that are float32 at a time, where a product needs them so: they should stay in the cache."""
MOST_NEAR = 4096
"""Most logits that are computed one by one. Where more are near the best, it is cheaper to compute all of them."""


class Head:
    """`x @ weight.T` in float32, not rounded to the type of `x` before.

    A bfloat16 product has 8 significant bits: of 49,152 logits near 20 the two best are often equal, and which of them
    is taken depends on sums in another order, and so on what happened to be cached.

    Args:
        weight: `[V, in]`.
        packed: Keep it in the layout that the processor multiplies fastest as well, where there is one.
        int8: For few inputs, read 8 bits of each weight and compute exactly only the logits near the best. A token
            that is `exp(4)` times less likely than the best one has its logit to 8 bits then.
    """

    def __init__(self, weight: Tensor, *, packed: bool = True, int8: bool = False) -> None:
        self._weight = weight
        self._packed = pack(weight) if packed and can_pack(weight.device, weight.dtype) else None
        self._halves = _in_halves(weight) if int8 and fits_int4(*weight.shape) else None

    def __call__(self, x: Tensor) -> Tensor:
        """Logits `[R, V]` of `[R, in]` inputs."""
        if self._halves is not None and len(x) <= FEW_ROWS:
            return self._near_the_best(x, self._halves)
        return self._all(x)

    def _all(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            return _with_remainder(x, self._packed)
        if x.dtype == torch.float32:
            return F.linear(x, self._weight)
        if x.is_cuda:
            return torch.mm(x, self._weight.t(), out_dtype=torch.float32)
        return torch.cat([F.linear(x.float(), rows.float()) for rows in torch.split(self._weight, UPCAST_ROWS)], -1)

    def _near_the_best(self, x: Tensor, halves: tuple[Int4Linear, Int4Linear]) -> Tensor:
        """A rough logit is off by a hundredth of its size or so: what is exact includes the best by a wide margin."""
        high, low = halves
        logits = high(x).float().add_(low(x))
        best = logits.amax(-1, keepdim=True)
        rows, tokens = (logits >= best - best.abs() / 16 - 4).nonzero(as_tuple=True)
        if len(rows) > MOST_NEAR:
            return self._all(x)
        exact = (x[rows].float() * self._weight[tokens].float()).sum(-1)
        return logits.index_put_((rows, tokens), exact)


def _with_remainder(x: Tensor, packed: Tensor) -> Tensor:
    """The rounded product, and what the rounding took away: oneDNN sums in float32, and rounds only its result.

    Exact to 16 bits, and cheaper than a float32 product: the second time the weight is warm in the cache.
    """
    rounded = packed_linear(x, packed)
    error: Tensor = torch.ops.mkldnn._linear_pointwise.binary(-x, rounded, packed, None, "add")
    return rounded.float().sub_(error)


def _in_halves(weight: Tensor) -> tuple[Int4Linear, Int4Linear]:
    """Weights as 8-bit codes, one scale for each 32 of a row, and those as two matrices of 4 bits::

        weight  =  scale * code  =  (16 * scale) * (code // 16)  +  scale * (code % 16)

    Weights that were stored so (Q8_0) are met exactly.
    """
    groups = weight.float().unflatten(-1, (-1, 32))
    scales = groups.abs().amax(-1) / 127
    codes = (groups / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round_().flatten(-2).to(torch.int8)
    high = Int4Matrix((codes >> 4).add_(8).to(torch.uint8), 16 * scales, -128 * scales)
    low = Int4Matrix((codes & 15).to(torch.uint8), scales, torch.zeros_like(scales))
    return Int4Linear(high), Int4Linear(low)
