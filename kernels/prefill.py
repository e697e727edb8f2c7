"""New tokens of several rows, each against its paged context: causal, and any number of tokens a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from treadle.kernels.paged import NO_WINDOW, attend, cache_arguments
from treadle.kernels.tiles import padded, prefill_tile


def prefill_attention(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    max_new: int,
    window: int | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """The last tokens of each row against its context up to themselves.

    A token that is not finite may spoil those before it in its own row too.

    Args:
        q: `[T, H, D]`, row after row.
        cache: Keys and values of the layer, `[2, P, S, K, D]`, the new tokens' included; int8 or e4m3 with `scales`,
            else the type of `q`.
        page_table: `[slots, max_pages]`, the pages of each slot.
        slots: `[R]`, the slot of each row.
        starts: int32 `[R + 1]`: row i has the queries from `starts[i]` to before `starts[i + 1]`, which may be none.
        lengths: int32 `[R]`, tokens of each context, the new ones included. Queries of a row of length 0 get 0.
        max_new: The most queries of a row, which decides how large tiles are, and nothing about the result.
        window: How many tokens, itself included, a token sees.
        scales: `[2, P, S, K]`, what the elements of a token and head are multiplied by.

    Returns:
        `[T, H, D]` in the type of `q`.
    """
    assert q.stride(2) == 1 and page_table.stride(1) == 1
    assert slots.stride(0) == 1 and lengths.stride(0) == 1 and starts.stride(0) == 1
    tokens, heads, size = q.shape
    kv_heads, rows = cache.shape[3], len(slots)
    group = heads // kv_heads
    tile = prefill_tile(max_new, group, size, cache.element_size())
    out = torch.empty(tokens, heads, size, dtype=q.dtype, device=q.device)
    # Rows begin within a tile: each may need one more than its tokens fill.
    prefill_kernel[(tokens // (tile.queries // group) + rows, kv_heads)](
        out=out,
        q=q,
        **cache_arguments(cache, scales),
        page_table=page_table,
        slots=slots,
        starts=starts,
        lengths=lengths,
        rows=rows,
        out_token_stride=out.stride(0),
        q_token_stride=q.stride(0),
        q_head_stride=q.stride(1),
        table_stride=page_table.stride(0),
        window=NO_WINDOW if window is None else window,
        WINDOWED=window is not None,
        G=group,
        BLOCK_ROWS=padded(rows),
        BLOCK_M=tile.queries,
        BLOCK_N=tile.tokens,
        BLOCK_D=max(padded(size), 16),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


@triton.jit
def prefill_kernel(
    out: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    page_table: tl.tensor,
    slots: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    rows: tl.tensor,
    out_token_stride: tl.tensor,
    q_token_stride: tl.tensor,
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
    G: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One program for each tile of a row's new tokens, times the heads of a group, and each key/value head.

    ::

        token of the context    0 ................ first of the tile ... last
        all of the tile see     |<- whole tiles ->|                             not masked
        some of the tile see                      |<---- the diagonal ---->|    masked
        with a window, before:  |<- masked ->|
    """
    TOKENS: tl.constexpr = BLOCK_M // G
    # The last programs to start should have the least to do, and the first tokens of a row see the least.
    index, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    candidate = tl.arange(0, BLOCK_ROWS)
    first_tile = tl.load(starts + candidate, mask=candidate < rows, other=0) // TOKENS + candidate
    row = tl.sum(((candidate < rows) & (first_tile <= index)).to(tl.int32), 0) - 1

    start, stop = tl.load(starts + row), tl.load(starts + row + 1)
    first = start + (index - start // TOKENS - row) * TOKENS
    if first >= stop:
        return
    member = tl.arange(0, BLOCK_M)
    token = (first + member // G).to(tl.int64)
    head = kv_head * G + member % G
    live = (token < stop) & (member < TOKENS * G)

    length = tl.load(lengths + row)
    before = length - stop
    position = (before + token).to(tl.int32)
    last = before + tl.minimum(first + TOKENS, stop) - 1
    begin = tl.maximum(before + first - window + 1, 0)
    end = last + 1

    d = tl.arange(0, BLOCK_D)[None, :]
    held = live[:, None] & (d < D)
    query = tl.load(q + token[:, None] * q_token_stride + head[:, None] * q_head_stride + d, mask=held, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    keys += kv_head * head_stride
    values += kv_head * head_stride
    key_scales += kv_head * scale_head_stride
    value_scales += kv_head * scale_head_stride
    table = page_table + tl.load(slots + row).to(tl.int64) * table_stride

    whole_from = begin
    if WINDOWED:
        # What some no longer see ends where all begin to see.
        whole_from += tl.cdiv(tl.maximum(last - window + 1 - begin, 0), BLOCK_N) * BLOCK_N
        whole_from = tl.minimum(whole_from, end)
    whole_to = whole_from + tl.maximum(before + first + 1 - whole_from, 0) // BLOCK_N * BLOCK_N
    for stretch in tl.static_range(0 if WINDOWED else 1, 3):
        acc, total, best = attend(
            query,
            acc,
            total,
            best,
            keys,
            values,
            key_scales,
            value_scales,
            page_stride,
            token_stride,
            scale_page_stride,
            scale_token_stride,
            table,
            begin if stretch == 0 else whole_from if stretch == 1 else whole_to,
            whole_from if stretch == 0 else whole_to if stretch == 1 else end,
            position - window + 1,
            position + 1,
            score_scale,
            D,
            PAGE,
            BLOCK_N,
            SCALED,
            MASKED=stretch != 1,
        )
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out + token[:, None] * out_token_stride + head[:, None] * D + d, result.to(out.dtype.element_ty), mask=held
    )
