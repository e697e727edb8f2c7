"""Rows that share pages are grouped so that as little as possible is read twice."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from treadle.runtime.engine.sharing import SharedPrefix, shared_prefixes


def groups(*tables, least=1, own=0):
    """Of page tables of any lengths, of which the last `own` pages are never shared."""
    padded = np.zeros((len(tables), max(map(len, tables))), dtype=np.int64)
    for row, pages in zip(padded, tables, strict=True):
        row[: len(pages)] = pages
    return shared_prefixes(padded, [len(pages) - own for pages in tables], least)


def test_rows_with_nothing_in_common_are_in_no_group():
    assert groups([1, 2], [3, 4], [5]) == []


def test_all_rows_share_a_prompt():
    assert groups([1, 2, 3], [1, 2, 4], [1, 2]) == [SharedPrefix((0, 1, 2), 2)]


def test_two_that_share_much_more_than_the_others_are_a_group_of_their_own():
    much = list(range(1, 10))
    found = groups([*much, 20], [1, 2, 30], [*much, 40], [1, 2, 50])
    assert found == [SharedPrefix((0, 2), 9), SharedPrefix((1, 3), 2)]


def test_all_together_are_better_off_than_two_that_share_little_more():
    assert groups([1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6], [1, 2, 7]) == [SharedPrefix((0, 1, 2, 3), 2)]


def test_conversations_of_two_prompts_are_two_groups():
    assert groups([1, 2], [8, 9], [1, 2, 3], [8, 9, 7]) == [SharedPrefix((0, 2), 2), SharedPrefix((1, 3), 2)]


def test_groups_that_save_little_are_left_out():
    assert groups([1, 2], [1, 2], least=3) == []
    assert groups([1, 2], [1, 2], [1, 2], least=3) == [SharedPrefix((0, 1, 2), 2)]


def test_what_a_row_writes_is_its_own():
    assert groups([1, 2], [1, 2], own=1) == [SharedPrefix((0, 1), 1)]


@st.composite
def trees(draw):
    """Page tables as a prefix tree gives them: each row goes on from a part of an earlier one, with fresh pages."""
    tables, fresh = [], iter(range(1, 1000))
    for index in range(draw(st.integers(1, 7))):
        base = tables[draw(st.integers(0, index - 1))] if index else []
        kept = base[: draw(st.integers(0, len(base)))]
        tables.append(kept + [next(fresh) for _ in range(draw(st.integers(0, 4)))])
    return [table or [next(fresh)] for table in tables]


def most_saved(tables):
    """By any one group: the rows that have a page, which share what comes before it too."""
    return max(
        (table.index(page) + 1) * sum(page in other for other in tables if other is not table)
        for table in tables
        for page in table
    )


@given(trees())
def test_no_one_group_saves_more_than_those_found(tables):
    found = groups(*tables)
    assert sum(group.num_saved for group in found) >= most_saved(tables)
    rows = [row for group in found for row in group.rows]
    assert len(rows) == len(set(rows))
    for group in found:
        assert len({tuple(tables[row][: group.num_pages]) for row in group.rows}) == 1
