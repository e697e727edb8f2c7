"""What the attention kernels have in common: queries against a stretch of a paged context.

::

    page_table[slot]   7 | 3 | 9 | ...          token t of a context is in page page_table[slot][t // S],
    cache[0][3]        k k k k ... k            at t % S; of a page, `token_stride` apart

In every kernel the heads of a group, who share a key/value head, are rows of one matrix: their keys are read once.

Arguments of kernels are annotated as tensors, which they are inside. Triton would take `int` to promise 32 bits.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

NO_WINDOW = 2**30
"""A sliding window that nothing falls out of. Positions less this still fit 32 bits."""


@triton.jit
def attend(
    q: tl.tensor,
    acc: tl.tensor,
    total: tl.tensor,
    best: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    page_stride: tl.tensor,
    token_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    scale_token_stride: tl.tensor,
    table: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    seen_from: tl.tensor,
    seen_to: tl.tensor,
    score_scale: tl.tensor,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALED: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Adds the tokens from `begin` to before `end` to the attention of queries `[M, BLOCK_D]`; a loop over tiles.

    `acc` `[M, BLOCK_D]` and `total` `[M]` are sums weighted by `exp2(score - best)` (online softmax, arXiv 1805.02867).
    A query sees the tokens from `seen_from` to before `seen_to`, `[M]`; or all, unless MASKED, and then the stretch is
    a multiple of BLOCK_N. Pointers are those of the key/value head and of the slot.
    """
    BLOCK_D: tl.constexpr = q.shape[1]
    d = tl.arange(0, BLOCK_D)[None, :]
    for start in range(begin, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        # Behind the end is another's context, or nothing: it is not read, for zero times NaN is NaN.
        known = token < end
        if MASKED:
            page = tl.load(table + token // PAGE, mask=known, other=0).to(tl.int64)
        else:
            page = tl.load(table + token // PAGE).to(tl.int64)
        place = (page * page_stride + (token % PAGE) * token_stride)[:, None] + d
        if MASKED or BLOCK_D != D:
            key = tl.load(keys + place, mask=known[:, None] & (d < D), other=0.0)
            value = tl.load(values + place, mask=known[:, None] & (d < D), other=0.0)
        else:
            key = tl.load(keys + place)
            value = tl.load(values + place)
        scores = tl.dot(q, tl.trans(key.to(q.dtype)), input_precision="ieee") * score_scale
        if SCALED:
            scale_place = page * scale_page_stride + (token % PAGE) * scale_token_stride
            scores *= tl.load(key_scales + scale_place, mask=known, other=0.0).to(tl.float32)[None, :]
        if MASKED:
            visible = (token[None, :] >= seen_from[:, None]) & (token[None, :] < seen_to[:, None]) & known[None, :]
            scores = tl.where(visible, scores, -float("inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        # Minus infinity as long as nothing was seen, and inf - inf is NaN.
        base = tl.where(higher == -float("inf"), 0.0, higher)
        probs = tl.exp2(scores - base[:, None])
        fade = tl.exp2(best - base)
        total = total * fade + tl.sum(probs, 1)
        if SCALED:
            probs *= tl.load(value_scales + scale_place, mask=known, other=0.0).to(tl.float32)[None, :]
        acc = tl.dot(probs.to(q.dtype), value.to(q.dtype), acc * fade[:, None], input_precision="ieee")
        best = higher
    return acc, total, best


@triton.jit
def store_part(
    sums: tl.tensor,
    weights: tl.tensor,
    part: tl.tensor,
    acc: tl.tensor,
    total: tl.tensor,
    best: tl.tensor,
    live: tl.tensor,
    D: tl.constexpr,
) -> None:
    """Writes what `merge` reads: for each query `[M]` that is live, its place in `weights`, and in `sums` times D."""
    BLOCK_D: tl.constexpr = acc.shape[1]
    d = tl.arange(0, BLOCK_D)[None, :]
    # NOTE: not `total > 0`, which NaN is not either.
    some = total != 0.0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    tl.store(sums + part[:, None] * D + d, acc, mask=live[:, None] & (d < D))
    weight = tl.where(some, best + tl.log2(tl.where(some, total, 1.0)), -float("inf"))
    tl.store(weights + part, weight, mask=live)


@triton.jit
def shared_tokens(groups: tl.tensor, row: tl.tensor, NUM_GROUPS: tl.constexpr, BLOCK_GROUPS: tl.constexpr) -> tl.tensor:
    """How many tokens a row attends to with its group, 0 if it is in none."""
    group = tl.arange(0, BLOCK_GROUPS)
    listed = group < NUM_GROUPS
    first = tl.load(groups + 3 * group, mask=listed, other=0)
    rows = tl.load(groups + 3 * group + 1, mask=listed, other=0)
    shared = tl.load(groups + 3 * group + 2, mask=listed, other=0)
    return tl.sum(tl.where((first <= row) & (row < first + rows), shared, 0), 0)


def cache_arguments(cache: Tensor, scales: Tensor | None) -> dict[str, object]:
    """How a kernel is told of a cache `[2, P, S, K, D]` and of its scales `[2, P, S, K]`."""
    assert cache.stride(4) == 1, "the elements of a head lie side by side"
    keys, values = cache.unbind(0)
    key_scales, value_scales = (keys, values) if scales is None else scales.unbind(0)
    page_stride, token_stride, head_stride = cache.stride()[1:4]
    scale_strides = (0, 0, 0) if scales is None else scales.stride()[1:]
    return {
        "keys": keys,
        "values": values,
        "key_scales": key_scales,
        "value_scales": value_scales,
        "page_stride": page_stride,
        "token_stride": token_stride,
        "head_stride": head_stride,
        "scale_page_stride": scale_strides[0],
        "scale_token_stride": scale_strides[1],
        "scale_head_stride": scale_strides[2],
        "score_scale": math.log2(math.e) / math.sqrt(cache.shape[4]),
        "D": cache.shape[4],
        "PAGE": cache.shape[2],
        "SCALED": scales is not None,
    }
