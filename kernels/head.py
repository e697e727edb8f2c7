"""From hidden states to logits: exact where the best of many is chosen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.kernels.linear import can_pack, pack, packed_linear

UPCAST_ROWS = 1024
"""Rows of a weight that are float32 at a time, where a product needs them so: they should stay in the cache."""
FEW_ROWS = 16
"""Most inputs for which it is cheaper to compute again what is near the best than all: finding it takes its time."""
MOST_NEAR = 4096
"""Most logits that are computed one by one."""


class Head:
    """`x @ weight.T` in float32, not rounded to the type of `x` before where it matters.

    A bfloat16 product has 8 significant bits: of 49,152 logits near 20 the two best are often equal, and which of them
    is taken depends on sums in another order, and so on what happened to be cached. So logits near the best are
    computed once more; a token that is `exp(4)` times less likely keeps its 8 bits.

    Args:
        weight: `[V, in]`.
        packed: Keep it in the layout that the processor multiplies fastest as well, where there is one.
    """

    def __init__(self, weight: Tensor, *, packed: bool = True) -> None:
        self._weight = weight
        self._packed = pack(weight) if packed and can_pack(weight.device, weight.dtype) else None

    def __call__(self, x: Tensor) -> Tensor:
        """Logits `[R, V]` of `[R, in]` inputs."""
        if self._packed is not None:
            return self._from_rounded(x, self._packed)
        if x.dtype == torch.float32:
            return F.linear(x, self._weight)
        if x.is_cuda:
            return torch.mm(x, self._weight.t(), out_dtype=torch.float32)
        return torch.cat([F.linear(x.float(), rows.float()) for rows in torch.split(self._weight, UPCAST_ROWS)], -1)

    def _from_rounded(self, x: Tensor, packed: Tensor) -> Tensor:
        """A rounded logit is off by at most a 512th of its size: what is computed again includes the best."""
        rounded = packed_linear(x, packed)
        logits = rounded.float()
        if len(x) <= FEW_ROWS:
            best = logits.amax(-1, keepdim=True)
            rows, tokens = (logits >= best - best.abs() / 64 - 4).nonzero(as_tuple=True)
            if len(rows) <= MOST_NEAR:
                exact = (x[rows].float() * self._weight[tokens].float()).sum(-1)
                return logits.index_put_((rows, tokens), exact)
        return logits.sub_(_remainder(x, rounded, packed))


def _remainder(x: Tensor, rounded: Tensor, packed: Tensor) -> Tensor:
    """What rounding added to a product: oneDNN sums in float32, and rounds only its result.

    Cheaper than a float32 product, and exact to 16 bits with it: the second time the weight is warm in the cache.
    """
    remainder: Tensor = torch.ops.mkldnn._linear_pointwise.binary(-x, rounded, packed, None, "add")
    return remainder
