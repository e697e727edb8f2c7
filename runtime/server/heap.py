"""Keeps the heap of a server from growing with what it has served.

The event loop reads each socket into a new buffer of 256 KiB. At first, glibc maps a block of that size apart from the
heap, but when the first one is freed it takes its size for the new threshold. From then on the buffers are cut from the
heap: something small that lives longer settles in the place of each, the next one does not fit there any more, and the
heap grows by some hundred bytes for each request, though nothing is held.
"""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD = -3
LARGE_BYTES = 128 << 10
"""What the threshold is before glibc moves it."""


def keep_large_blocks_apart() -> None:
    """Has this process's large blocks mapped apart from the heap for good. Does nothing where the C library has no
    such setting.

    Not for a process with an engine in it, whose tensors come and go at every step: there a map each is slow.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
