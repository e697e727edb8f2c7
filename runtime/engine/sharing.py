"""Which rows of a step have the beginning of their contexts in common, so that it is attended to once for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treadle.scheduler import Row

LEAST_SAVED = 1024
"""Tokens of KV that must not be read again for each row, for a group to be worth a product more in each layer."""


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Rows, by index, whose first `num_pages` pages are the same."""

    rows: tuple[int, ...]
    num_pages: int

    @property
    def num_saved(self) -> int:
        """Pages that need not be read again."""
        return (len(self.rows) - 1) * self.num_pages


def find_sharing(rows: Sequence[Row], tables: NDArray[np.int64], page_size: int) -> list[SharedPrefix]:
    """Groups of rows with one token each. `tables` are the pages of each slot, `[slots, max_pages]`."""
    slots = [row.slot for row in rows]
    # Who shares a page shares the first.
    if len(np.unique(tables[slots, 0])) == len(rows):
        return []
    # The page of a row's newest token is its own.
    counts = [row.start // page_size for row in rows]
    own = tables[slots, : max(counts)]
    return shared_prefixes(own, counts, -(-LEAST_SAVED // page_size))


def shared_prefixes(tables: NDArray[np.int64], num_pages: Sequence[int], least: int) -> list[SharedPrefix]:
    """Disjoint groups of rows that save much: pages are read once for a group instead of once for each of its rows.

    ::

        rows 0 to 3 share 2 pages, and 0 and 1 share 9    one group saves 3 x 2 pages, 0 and 1 alone 1 x 9,
                                                          and 2 and 3 beside them 1 x 2

    Args:
        tables: `[R, N]`, the pages of each row. A page that two rows share is at the same index in both, after others
            that they share.
        num_pages: Of each row, how many of its pages another may share.
        least: Groups that save fewer pages are left out.
    """
    found = _best(tables, np.asarray(num_pages), np.arange(len(tables)), 0)
    return [group for group in found if group.num_saved >= least]


def _best(
    tables: NDArray[np.int64], num_pages: NDArray[np.int64], rows: NDArray[np.int64], known: int
) -> list[SharedPrefix]:
    """Groups of rows that share at least `known` pages."""
    if len(rows) < 2:
        return []
    limit = int(num_pages[rows].min())
    same = (tables[rows, known:limit] == tables[rows[0], known:limit]).all(0)
    common = known + (len(same) if bool(same.all()) else int(same.argmin()))
    longer = rows[num_pages[rows] > common]
    nexts = tables[longer, common] if len(longer) else longer
    pages, counts = np.unique(nexts, return_counts=True)
    groups: list[SharedPrefix] = []
    for page in pages[counts > 1]:
        part = _best(tables, num_pages, longer[nexts == page], common + 1)
        # In groups of their own, rows save what they share beyond the others, and no longer what they share with them.
        if sum(group.num_saved for group in part) > common * sum(len(group.rows) for group in part):
            groups += part
    left = np.setdiff1d(rows, [row for group in groups for row in group.rows])
    return [*groups, SharedPrefix(tuple(left.tolist()), common)] if len(left) > 1 else groups
