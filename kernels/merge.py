"""Attention over parts of a context, put together: exact, for each part says how much it weighs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from treadle.kernels.tiles import padded


@triton.jit
def merge_kernel(
    out: tl.tensor,
    sums: tl.tensor,
    weights: tl.tensor,
    out_row_stride: tl.tensor,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One program for each row and head."""
    row, head = tl.program_id(0), tl.program_id(1)
    part, d = tl.arange(0, BLOCK_PARTS), tl.arange(0, BLOCK_D)
    first = (row.to(tl.int64) * tl.num_programs(1) + head) * PARTS
    weight = tl.load(weights + first + part, mask=part < PARTS, other=-float("inf"))
    # A part that saw nothing wrote no sums: there may be anything.
    seen = weight != -float("inf")
    sum_ = tl.load(sums + (first + part)[:, None] * D + d, mask=seen[:, None] & (d < D), other=0.0)
    best = tl.max(weight, 0)
    share = tl.exp2(weight - tl.where(best == -float("inf"), 0.0, best))
    total = tl.sum(share, 0)
    merged = tl.sum(sum_ * share[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row.to(tl.int64) * out_row_stride + head * D + d, merged.to(out.dtype.element_ty), mask=d < D)


def merge(sums: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention of each row and head over the union of parts of its context, `[B, H, D]`; zero if all are empty.

    Args:
        sums: float32 `[B, H, N, D]`, the attention over each part alone; not read where the part is empty.
        weights: float32 `[B, H, N]`, the log2 of the sum over a part of the exponentials of its scores; minus infinity
            for a part that is empty.
    """
    rows, heads, parts, size = sums.shape
    out = sums.new_empty(rows, heads, size, dtype=dtype)
    merge_kernel[(rows, heads)](
        out=out,
        sums=sums,
        weights=weights,
        out_row_stride=out.stride(0),
        PARTS=parts,
        BLOCK_PARTS=padded(parts),
        D=size,
        BLOCK_D=padded(size),
        num_warps=4,
    )
    return out
