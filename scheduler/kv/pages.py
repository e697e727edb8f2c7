"""The pool of KV pages: which are free. Who holds the others is the business of the prefix tree and the calls."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Hands out page numbers `0 .. num_pages - 1`, the most recently freed first."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_ever_used = 0  # pages from this number on have never been handed out
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = bytearray(b"\x01") * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages. The caller has checked that there are as many."""
        assert count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._is_free[page] = 0
        self.num_ever_used = max(self.num_ever_used, 1 + max(pages, default=-1))
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Gives pages back."""
        for page in pages:
            assert not self._is_free[page], f"page {page} freed twice"
            self._is_free[page] = 1
            self._free.append(page)

    def check_integrity(self) -> None:
        """Asserts that the free list and the free marks agree."""
        assert len(self._free) == len(set(self._free)) == sum(self._is_free)
        assert all(self._is_free[page] for page in self._free)
