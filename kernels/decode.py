"""One token a row against its paged context, which several programs share out among themselves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from treadle.kernels.merge import merge
from treadle.kernels.paged import NO_WINDOW, attend, cache_arguments, shared_tokens, store_part
from treadle.kernels.tiles import decode_tile, padded


def decode_attention(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    lengths: Tensor,
    *,
    num_splits: int,
    window: int | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """The newest token of each row against all of its context (flash decoding: split, and merged exactly).

    What is launched depends on no length, so that a CUDA graph can hold it.

    Args:
        q: `[B, H, D]`.
        cache: Keys and values of the layer, `[2, P, S, K, D]`; int8 or e4m3 with `scales`, else the type of `q`.
        page_table: `[slots, max_pages]`, the pages of each slot.
        slots: `[B]`, the slot of each row.
        lengths: int32 `[B]`, tokens of each context, the newest included. A row of length 0 reads nothing and gets 0.
        num_splits: Into how many parts a context is cut; `tiles.decode_splits` knows.
        window: How many tokens, the newest included, a row sees.
        scales: `[2, P, S, K]`, what the elements of a token and head are multiplied by.

    Returns:
        `[B, H, D]` in the type of `q`.
    """
    rows, heads, size = q.shape
    sums = torch.empty(rows, heads, num_splits, size, dtype=torch.float32, device=q.device)
    weights = torch.empty(rows, heads, num_splits, dtype=torch.float32, device=q.device)
    attend_alone(sums, weights, q, cache, page_table, slots, lengths, num_splits, window=window, scales=scales)
    return merge(sums, weights, q.dtype)


def attend_alone(
    sums: Tensor,
    weights: Tensor,
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    lengths: Tensor,
    num_splits: int,
    *,
    groups: Tensor | None = None,
    window: int | None = None,
    scales: Tensor | None = None,
) -> None:
    """Writes the first `num_splits` parts of each row's attention, for `merge`.

    Args:
        sums, weights: `[B, H, N, D]` and `[B, H, N]`, float32.
        groups: int32 `[M, 3]`: rows that attend to their first tokens elsewhere (`shared.py`). Those tokens are left
            out; a row in no group gets empty parts in place of theirs.
    """
    assert q.stride(2) == 1 and slots.stride(0) == 1 and lengths.stride(0) == 1 and page_table.stride(1) == 1
    kv_heads, size = cache.shape[3:]
    group = q.shape[1] // kv_heads
    num_groups = 0 if groups is None else len(groups)
    tile = decode_tile(group, size, cache.element_size())
    decode_kernel[(len(q), kv_heads, num_splits)](
        sums=sums,
        weights=weights,
        q=q,
        **cache_arguments(cache, scales),
        page_table=page_table,
        slots=slots,
        lengths=lengths,
        groups=lengths if groups is None else groups,
        q_row_stride=q.stride(0),
        q_head_stride=q.stride(1),
        table_stride=page_table.stride(0),
        window=NO_WINDOW if window is None else window,
        PARTS=weights.shape[2],
        BLOCK_PARTS=padded(weights.shape[2]),
        SPLITS=num_splits,
        G=group,
        NUM_GROUPS=num_groups,
        BLOCK_GROUPS=padded(max(num_groups, 1)),
        BLOCK_M=tile.queries,
        BLOCK_N=tile.tokens,
        BLOCK_D=max(padded(size), 16),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@triton.jit
def decode_kernel(
    sums: tl.tensor,
    weights: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    page_table: tl.tensor,
    slots: tl.tensor,
    lengths: tl.tensor,
    groups: tl.tensor,
    q_row_stride: tl.tensor,
    q_head_stride: tl.tensor,
    page_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    scale_token_stride: tl.tensor,
    scale_head_stride: tl.tensor,
    table_stride: tl.tensor,
    window: tl.tensor,
    score_scale: tl.tensor,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SCALED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    G: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One program for each row, key/value head and split."""
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    member, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    live = member < G
    part = ((row * tl.num_programs(1) + kv_head) * G + member) * PARTS

    length = tl.load(lengths + row)
    first = tl.maximum(length - window, 0)
    if NUM_GROUPS > 0:
        shared = shared_tokens(groups, row, NUM_GROUPS, BLOCK_GROUPS)
        first = tl.maximum(first, shared)
        if (split == 0) & (shared == 0):
            elsewhere = tl.arange(0, BLOCK_PARTS)[None, :]
            unwritten = live[:, None] & (elsewhere >= SPLITS) & (elsewhere < PARTS)
            nothing = tl.full([BLOCK_M, BLOCK_PARTS], -float("inf"), tl.float32)
            tl.store(weights + part[:, None] + elsewhere, nothing, mask=unwritten)

    # Whole tiles for each split; the last ones may get none.
    stretch = tl.cdiv(tl.cdiv(tl.maximum(length - first, 0), BLOCK_N), SPLITS) * BLOCK_N
    begin = first + split * stretch
    end = tl.minimum(begin + stretch, length)
    if begin >= end:
        tl.store(weights + part + split, tl.full([BLOCK_M], -float("inf"), tl.float32), mask=live)
        return

    slot = tl.load(slots + row).to(tl.int64)
    query = tl.load(
        q + row * q_row_stride + (kv_head * G + member)[:, None] * q_head_stride + d[None, :],
        mask=live[:, None] & (d < D)[None, :],
        other=0.0,
    )
    acc, total, best = attend(
        query,
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.full([BLOCK_M], -float("inf"), tl.float32),
        keys + kv_head * head_stride,
        values + kv_head * head_stride,
        key_scales + kv_head * scale_head_stride,
        value_scales + kv_head * scale_head_stride,
        page_stride,
        token_stride,
        scale_page_stride,
        scale_token_stride,
        page_table + slot * table_stride,
        begin,
        end,
        tl.zeros([BLOCK_M], tl.int32),
        tl.zeros([BLOCK_M], tl.int32) + end,
        score_scale,
        D,
        PAGE,
        BLOCK_N,
        SCALED,
        True,
    )
    store_part(sums, weights, part + split, acc, total, best, live, D)
