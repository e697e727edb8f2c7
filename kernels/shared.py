"""One token a row, where rows that begin with the same pages attend to those together (cascade attention)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from treadle.kernels.decode import attend_alone
from treadle.kernels.merge import merge
from treadle.kernels.paged import NO_WINDOW, attend, cache_arguments, store_part
from treadle.kernels.tiles import padded, shared_tile


def shared_prefix_attention(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    lengths: Tensor,
    groups: Tensor,
    *,
    num_splits: int,
    shared_splits: int,
    window: int | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """What `decode_attention` gives, but a group's shared pages are read once and not once a row.

    ::

        row 0   shared by rows 0 to 2 ........ | its own ...       together: [rows x heads, D] queries in one matrix
        row 1   the same pages                 | its own .
        row 2   the same pages                 | its own .....     alone: the decode kernel, from where sharing ends
        row 3   its own ....                                       a merge puts the parts of a row together, exactly

    As there, what is launched depends on no length and on no group: a CUDA graph can hold it.

    Args:
        groups: int32 `[M, 3]`: a group's first row, its number of rows, and how many tokens they share: a multiple of
            the page size, and fewer than any of them has. Groups come in the order of their rows; those at the end may
            have no rows. A row belongs to one group at most.
        num_splits: Into how many parts what a row has alone is cut.
        shared_splits: Into how many parts what a group shares is cut; `tiles.decode_splits` of the groups knows.

    The other arguments and the result are those of `decode_attention`.
    """
    assert q.stride(2) == 1 and page_table.stride(1) == 1
    assert slots.stride(0) == 1 and lengths.stride(0) == 1 and groups.is_contiguous()
    rows, heads, size = q.shape
    kv_heads, num_groups = cache.shape[3], len(groups)
    parts = num_splits + shared_splits
    sums = torch.empty(rows, heads, parts, size, dtype=torch.float32, device=q.device)
    weights = torch.empty(rows, heads, parts, dtype=torch.float32, device=q.device)
    group = heads // kv_heads
    tile = shared_tile(rows * group, size, cache.element_size())
    # Groups begin within a tile: each may need one more than its rows fill.
    shared_kernel[(rows * group // tile.queries + num_groups, kv_heads, shared_splits)](
        sums=sums,
        weights=weights,
        q=q,
        **cache_arguments(cache, scales),
        page_table=page_table,
        slots=slots,
        lengths=lengths,
        groups=groups,
        q_row_stride=q.stride(0),
        q_head_stride=q.stride(1),
        table_stride=page_table.stride(0),
        window=NO_WINDOW if window is None else window,
        WINDOWED=window is not None,
        PARTS=parts,
        ALONE=num_splits,
        G=group,
        NUM_GROUPS=num_groups,
        BLOCK_GROUPS=padded(num_groups),
        BLOCK_M=tile.queries,
        BLOCK_N=tile.tokens,
        BLOCK_D=max(padded(size), 16),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    alone = (sums, weights, q, cache, page_table, slots, lengths, num_splits)
    attend_alone(*alone, groups=groups, window=window, scales=scales)
    return merge(sums, weights, q.dtype)


@triton.jit
def shared_kernel(
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
    WINDOWED: tl.constexpr,
    PARTS: tl.constexpr,
    ALONE: tl.constexpr,
    G: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One program for each tile of a group's rows times the heads of a key/value head, each of those, and split."""
    index, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    candidate = tl.arange(0, BLOCK_GROUPS)
    listed = candidate < NUM_GROUPS
    used = tl.load(groups + 3 * candidate + 1, mask=listed, other=0) > 0
    first_tile = tl.load(groups + 3 * candidate, mask=used, other=0) * G // BLOCK_M + candidate
    group = tl.sum((used & (first_tile <= index)).to(tl.int32), 0) - 1
    if group < 0:
        return
    first_row, rows = tl.load(groups + 3 * group), tl.load(groups + 3 * group + 1)
    shared = tl.load(groups + 3 * group + 2)
    member = (index - first_row * G // BLOCK_M - group) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = member < rows * G
    if tl.max(live.to(tl.int32), 0) == 0:
        return
    row = (first_row + member // G).to(tl.int64)
    head = kv_head * G + member % G
    part = (row * tl.num_programs(1) * G + head) * PARTS + ALONE + split

    # Whole tiles for each split; the last ones may get none.
    stretch = tl.cdiv(tl.cdiv(shared, BLOCK_N), PARTS - ALONE) * BLOCK_N
    begin = split * stretch
    end = tl.minimum(begin + stretch, shared)
    if begin >= end:
        tl.store(weights + part, tl.full([BLOCK_M], -float("inf"), tl.float32), mask=live)
        return

    d = tl.arange(0, BLOCK_D)[None, :]
    held = live[:, None] & (d < D)
    query = tl.load(q + row[:, None] * q_row_stride + head[:, None] * q_head_stride + d, mask=held, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    seen_from = tl.load(lengths + row, mask=live, other=0) - window
    seen_to = tl.zeros([BLOCK_M], tl.int32) + end
    whole_to = begin if WINDOWED else begin + (end - begin) // BLOCK_N * BLOCK_N
    table = page_table + tl.load(slots + first_row).to(tl.int64) * table_stride
    for masked in tl.static_range(1 if WINDOWED else 0, 2):
        acc, total, best = attend(
            query,
            acc,
            total,
            best,
            keys + kv_head * head_stride,
            values + kv_head * head_stride,
            key_scales + kv_head * scale_head_stride,
            value_scales + kv_head * scale_head_stride,
            page_stride,
            token_stride,
            scale_page_stride,
            scale_token_stride,
            table,
            whole_to if masked else begin,
            end if masked else whole_to,
            seen_from,
            seen_to,
            score_scale,
            D,
            PAGE,
            BLOCK_N,
            SCALED,
            MASKED=masked,
        )
    store_part(sums, weights, part, acc, total, best, live, D)
