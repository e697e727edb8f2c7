"""How the attention kernels cut their work up: tables that are looked up, never searched at run time.

A search would stall the first step of each shape, and cannot happen while a CUDA graph is captured. What is here was
chosen by compiling for an H200: nothing spills, and enough programs fit on a processor to hide what one waits for.
None of it has been timed on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

PROCESSORS = 132
"""Streaming multiprocessors of an H100 or H200."""
MOST_SPLITS = 32
"""Beyond this the partial results of a row are as much to read as its context."""
SMALLEST_DOT = 16
"""Least rows and columns of a tile that the tensor cores multiply."""


class Tile(NamedTuple):
    """What a program holds at a time: queries (tokens times the heads of a group) and tokens of the context."""

    queries: int
    tokens: int
    num_warps: int
    num_stages: int


def decode_splits(rows: int, kv_heads: int) -> int:
    """Into how many parts to cut each context, so that rows decode on the whole device: two programs a processor."""
    wanted = 2 * PROCESSORS // (rows * kv_heads)
    return min(1 << max(wanted, 1).bit_length() - 1, MOST_SPLITS)


def decode_tile(group: int, head_size: int, cache_bytes: int) -> Tile:
    """For one token of `group` query heads against a cache of elements of this many bytes.

    Decoding waits for memory. Five stages let Triton fetch two tiles ahead, after the pages that they are in; two
    programs of 72 KB (64 tokens of 128 bfloat16) have room on a processor.
    """
    queries = max(padded(group), SMALLEST_DOT)
    if head_size > 128 or cache_bytes > 2:
        return Tile(queries, 32, 4, 3)
    if cache_bytes == 1:
        # To widen 64 tokens of codes takes 242 registers of 255.
        return Tile(queries, 32, 4, 5)
    return Tile(queries, 64, 4, 5)


def prefill_tile(queries: int, head_size: int, cache_bytes: int) -> Tile:
    """For a longest row of so many new tokens times heads of a group."""
    if cache_bytes > 2:
        return Tile(32, 32, 4, 2)
    if head_size > 128:
        return Tile(64, 32, 8, 2)
    if queries <= 64:
        return Tile(64, 64, 4, 3)
    return Tile(128, 64, 8, 3)


def shared_tile(queries: int, head_size: int, cache_bytes: int) -> Tile:
    """For a batch of so many rows times heads of a group, of which some share what they attend to."""
    if cache_bytes > 2:
        return Tile(32, 32, 4, 2)
    if head_size > 128:
        return Tile(64, 32, 8, 2)
    if queries <= 32:
        return Tile(32, 64, 4, 3)
    return Tile(64, 64, 4, 3)


def padded(count: int) -> int:
    """The next power of two: what Triton's blocks must have."""
    return 1 << (count - 1).bit_length()
