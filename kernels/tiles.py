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
    """What a program holds at a time: queries (tokens or rows times the heads of a group) and tokens of the context."""

    queries: int
    tokens: int
    num_warps: int
    num_stages: int

    def holding(self, group: int) -> Tile:
        """This tile, or one with more queries if the heads of a group are more than it has."""
        return self._replace(queries=max(self.queries, padded(group)))


FLOAT32 = Tile(16, 16, 8, 2)
"""Tensor cores do not multiply float32 exactly, and without them tiles must be small: registers spill at twice this."""


def decode_splits(rows: int, kv_heads: int) -> int:
    """Into how many parts to cut each context, so that rows decode on the whole device: two programs a processor."""
    wanted = 2 * PROCESSORS // (rows * kv_heads)
    return min(1 << max(wanted, 1).bit_length() - 1, MOST_SPLITS)


def decode_tile(group: int, head_size: int, cache_bytes: int) -> Tile:
    """For one token of `group` query heads against a cache of elements of this many bytes.

    Decoding waits for memory. Five stages let Triton fetch two tiles ahead, after the pages that they are in; two
    programs of 72 KB (64 tokens of 128 bfloat16) have room on a processor.
    """
    if cache_bytes > 2:
        tile = FLOAT32
    elif head_size > 128:
        tile = Tile(SMALLEST_DOT, 32, 4, 3)
    elif cache_bytes == 1:
        # To widen 64 tokens of codes takes 242 registers of 255.
        tile = Tile(SMALLEST_DOT, 32, 4, 5)
    else:
        tile = Tile(SMALLEST_DOT, 64, 4, 5)
    return tile.holding(group)


def prefill_tile(max_new: int, group: int, head_size: int, cache_bytes: int) -> Tile:
    """For rows of at most so many new tokens, of `group` query heads each.

    From 64 queries on, Triton multiplies with wgmma. 128 of them in 8 warps take 172 to 247 registers a thread.
    """
    if cache_bytes > 2:
        tile = FLOAT32
    elif head_size > 128:
        tile = Tile(64, 32, 8, 2)
    elif max_new * group <= 64:
        tile = Tile(64, 64, 4, 3)
    else:
        tile = Tile(128, 64, 8, 3)
    return tile.holding(group)


def shared_tile(queries: int, head_size: int, cache_bytes: int) -> Tile:
    """For a batch of so many rows times heads of a group, of which some share what they attend to.

    64 queries of 128 elements take 206 to 254 registers beside 32 tokens, so that two programs have room on a
    processor; beside 64 tokens some spill. With heads of 64 elements 64 tokens do fit, unless they are codes to widen.
    """
    if cache_bytes > 2:
        return FLOAT32
    if head_size > 128:
        return Tile(32 if cache_bytes == 1 else 64, 32, 8, 2)
    return Tile(32 if queries <= 32 else 64, 32 if head_size > 64 or cache_bytes == 1 else 64, 4, 3)


def padded(count: int) -> int:
    """The next power of two: what Triton's blocks must have."""
    return 1 << (count - 1).bit_length()
