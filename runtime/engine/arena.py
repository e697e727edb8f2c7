"""The memory of KV pages on a CPU."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

from treadle.runtime.errors import InvalidRequestError

_BYTES_AT_ONCE = 2 << 20


class Arena:
    """Memory that the system gives when it is first written to: what is never used costs nothing.

    That takes time, which steps would wait. `touch_ahead` has it given while there is nothing else to do; from its
    first call on in huge pages (2 MiB), where the system has them.

    ::

        region 0   | chunk | chunk | chunk ...     A region: the keys or the values of a layer, in all pages.
        region 1   | chunk | chunk | chunk ...     A chunk: some pages of a region, touched at once; first those of the
          ...                                      same pages in all regions.
    """

    def __init__(self, num_layers: int, num_pages: int, page: tuple[int, ...], dtype: torch.dtype) -> None:
        shape = num_layers, 2, num_pages, *page
        num_bytes = math.prod(shape) * dtype.itemsize
        try:
            self._memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise InvalidRequestError(
                f"the system does not give this process {num_bytes / 2**30:.1f} GiB for {num_pages} KV pages "
                f"({error.strerror}); use fewer (num_pages), or raise its limit (ulimit -v)"
            ) from None
        self.kv = torch.frombuffer(self._memory, dtype=dtype).view(shape)
        self._regions = self.kv.flatten(0, 1)
        self._chunk_pages = max(1, _BYTES_AT_ONCE // (math.prod(page) * dtype.itemsize))
        self._num_touched = 0

    def touch_ahead(self, num_used: int) -> bool:
        """Touches a chunk. Ready are kept an eighth of all pages, or as many again as were ever used if that is more.

        Args:
            num_used: Pages from this number on have never been used.

        Returns:
            Whether there was one left to touch.
        """
        if not self._num_touched and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # of a kernel that has none
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        num_regions, num_pages = self._regions.shape[:2]
        self._num_touched = max(self._num_touched, num_used // self._chunk_pages * num_regions)
        column, region = divmod(self._num_touched, num_regions)
        begin = column * self._chunk_pages
        if begin >= min(num_pages, max(num_pages // 8, 2 * num_used)):
            return False
        self._regions[region, max(begin, num_used) : begin + self._chunk_pages].zero_()
        self._num_touched += 1
        return True
