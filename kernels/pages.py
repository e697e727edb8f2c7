"""Copies pages of a cache, in all layers at once: within the device, or between it and pinned memory of the host."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Elements that are on their way at a time in a program."""


@triton.jit
def copy_pages_kernel(
    source: tl.tensor,
    target: tl.tensor,
    sources: tl.tensor,
    targets: tl.tensor,
    source_stride: tl.tensor,
    target_stride: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """One program for each page and each side of a layer, where the page is `SIZE` elements in a row."""
    pair, side = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # NOTE: in 64 bits, because a cache has more than 2^31 elements.
    read = source + side * source_stride + tl.load(sources + pair).to(tl.int64) * SIZE
    written = target + side * target_stride + tl.load(targets + pair).to(tl.int64) * SIZE
    for first in range(0, SIZE, BLOCK_SIZE):
        cells = first + tl.arange(0, BLOCK_SIZE)
        tl.store(written + cells, tl.load(read + cells, mask=cells < SIZE), mask=cells < SIZE)


def copy_pages(source: Tensor, target: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copies pages of `[layers, 2, P, ...]`, a cache or its scales, from one to another or within one.

    The two may differ in P. Each is on the device, or in pinned memory of the host, where the device finds it at the
    same address.

    Args:
        sources, targets: `[N]` on the device. Pages are copied in no order: no page may be written twice, and within
            one cache none may be both read and written.
    """
    assert source.is_contiguous() and target.is_contiguous() and source.dtype == target.dtype
    assert source.shape[:2] == target.shape[:2] and source.shape[3:] == target.shape[3:]
    layers, sides = source.shape[:2]
    size = source.stride(2)
    copy_pages_kernel[(len(sources), layers * sides)](
        source,
        target,
        sources,
        targets,
        source.stride(1),
        target.stride(1),
        SIZE=size,
        BLOCK_SIZE=min(BLOCK, triton.next_power_of_2(size)),
        num_warps=4,
    )
