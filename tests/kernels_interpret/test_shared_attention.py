"""Rows that share a prefix attend to it together, as Triton's interpreter computes it, against the formula."""

import pytest
import torch
from kernels_interpret.paged import paged_contexts, query_type, tolerance

from treadle.kernels.decode import decode_attention
from treadle.kernels.shared import shared_prefix_attention


def attention(paged, groups, q, *, num_splits=2, shared_splits=2, window=None):
    arguments = paged.page_table, paged.slots, paged.lengths, torch.tensor(groups, dtype=torch.int32)
    options = {"num_splits": num_splits, "shared_splits": shared_splits, "window": window, "scales": paged.scales}
    return shared_prefix_attention(q, paged.cache, *arguments, **options)


def queries(paged, group=2):
    kv_heads, size = paged.cache.shape[3:]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(len(paged.lengths), kv_heads * group, size, generator=generator)
    return q.to(query_type(paged.cache.dtype))


def assert_right(paged, groups, *, group=2, window=None, **splits):
    q = queries(paged, group)
    out = attention(paged, groups, q, window=window, **splits)
    for row, length in enumerate(paged.lengths.tolist()):
        if length == 0:
            assert torch.equal(out[row], torch.zeros_like(out[row]))
        else:
            expected = paged.attention(row, q[row], length - 1, window)
            torch.testing.assert_close(out[row], expected, **tolerance(q.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("page", [16, 32, 64])
def test_rows_see_what_they_share_and_what_is_their_own(page, dtype):
    groups = [(0, 3, 128)]
    assert_right(paged_contexts([129, 150, 192], kv_heads=1, page=page, dtype=dtype, shared=groups), groups)


def test_some_rows_share_and_others_do_not():
    groups = [(1, 2, 64), (4, 3, 16)]
    assert_right(paged_contexts([70, 65, 80, 30, 17, 40, 20, 5], kv_heads=1, shared=groups), groups)


def test_groups_without_rows_are_none():
    groups = [(0, 2, 32), (0, 0, 0), (0, 0, 0)]
    assert_right(paged_contexts([40, 33, 20], kv_heads=1, shared=groups[:1]), groups)


def test_no_group_is_in_use():
    assert_right(paged_contexts([40, 33], kv_heads=1), [(0, 0, 0)])


def test_rows_of_no_length_get_zero_beside_a_group():
    groups = [(0, 2, 32)]
    assert_right(paged_contexts([40, 33, 0, 0], kv_heads=1, shared=groups), groups)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("size", [64, 96, 128])
def test_heads_of_any_group_and_size(size, group):
    groups = [(1, 3, 48)]
    assert_right(paged_contexts([9, 50, 66, 49], kv_heads=1, size=size, shared=groups), groups, group=group)


def test_a_group_fills_several_tiles():
    groups = [(1, 11, 32), (12, 2, 16)]
    lengths = [20, *range(33, 44), 20, 30]
    paged = paged_contexts(lengths, kv_heads=1, size=16, dtype=torch.float16, shared=groups)
    assert_right(paged, groups, group=7, num_splits=1, shared_splits=1)


@pytest.mark.parametrize(("num_splits", "shared_splits"), [(1, 1), (1, 20), (5, 3)])
def test_parts_without_a_context_count_for_nothing(num_splits, shared_splits):
    groups = [(0, 1, 80)]
    paged = paged_contexts([81, 100], kv_heads=1, shared=groups)
    assert_right(paged, groups, num_splits=num_splits, shared_splits=shared_splits)


@pytest.mark.parametrize("window", [1, 20, 60, 100, 1000])
def test_a_window_hides_what_is_older_even_if_it_is_shared(window):
    groups = [(0, 3, 64)]
    assert_right(paged_contexts([65, 90, 140, 30], kv_heads=1, shared=groups), groups, window=window)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_cache_of_8_bits(dtype):
    groups = [(0, 2, 64)]
    assert_right(paged_contexts([70, 81, 33], kv_heads=1, size=96, dtype=dtype, shared=groups), groups)


def test_sharing_changes_no_row_beside_it():
    groups = [(0, 2, 64)]
    paged = paged_contexts([70, 81, 33, 100], kv_heads=1, shared=groups)
    q = queries(paged)
    alone = decode_attention(q, paged.cache, paged.page_table, paged.slots, paged.lengths, num_splits=2)
    assert torch.equal(attention(paged, groups, q)[2:], alone[2:])
