"""New tokens against their paged contexts, as Triton's interpreter computes it, against the formula."""

import pytest
import torch
from kernels_interpret.paged import paged_contexts, query_type, tolerance

from treadle.kernels.prefill import prefill_attention


def assert_right(paged, counts, *, group=2, window=None, seed=1):
    kv_heads, size = paged.cache.shape[3:]
    dtype = query_type(paged.cache.dtype)
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(int(starts[-1]), kv_heads * group, size, generator=generator).to(dtype)
    arguments = paged.page_table, paged.slots, starts, paged.lengths
    out = prefill_attention(q, paged.cache, *arguments, max_new=max(counts), window=window, scales=paged.scales)
    for row, (start, length, count) in enumerate(zip(starts.tolist(), paged.lengths.tolist(), counts, strict=False)):
        for index in range(count):
            if length == 0:
                assert torch.equal(out[start + index], torch.zeros_like(q[0]))
                continue
            expected = paged.attention(row, q[start + index], length - count + index, window)
            torch.testing.assert_close(out[start + index], expected, **tolerance(dtype))


@pytest.mark.parametrize("page", [16, 32, 64])
@pytest.mark.parametrize(("length", "count"), [(1, 1), (70, 70), (100, 1), (130, 33), (129, 64)])
def test_a_token_sees_its_context_up_to_itself(length, count, page):
    assert_right(paged_contexts([length], kv_heads=1, page=page, dtype=torch.float16), [count])


def test_rows_of_any_lengths_go_together():
    assert_right(paged_contexts([40, 7, 33, 90, 1], dtype=torch.float32), [40, 1, 17, 9, 1])


def test_a_row_may_have_no_new_token():
    assert_right(paged_contexts([20, 9, 30], kv_heads=1), [20, 0, 3])
    assert_right(paged_contexts([20, 0, 30, 0], kv_heads=1), [20, 0, 3, 0])


def test_a_row_of_no_length_reads_nothing_and_gets_zero():
    assert_right(paged_contexts([20, 0, 5], kv_heads=1), [4, 6, 5])


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("size", [64, 96, 128])
def test_heads_of_any_group_and_size(size, group):
    assert_right(paged_contexts([45, 19], kv_heads=1, size=size, dtype=torch.float16), [21, 19], group=group)


@pytest.mark.parametrize("size", [16, 80, 256])
def test_heads_that_fill_no_block(size):
    assert_right(paged_contexts([41, 3], kv_heads=1, size=size, dtype=torch.float16), [20, 3])


@pytest.mark.parametrize("window", [1, 16, 50, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_window_hides_what_is_older(window, dtype):
    assert_right(paged_contexts([12, 70, 150], kv_heads=1, dtype=dtype), [12, 1, 40], window=window)


def test_what_fell_out_of_every_window_is_not_read():
    paged = paged_contexts([100], kv_heads=1)
    pages = paged.page_table[paged.slots[0]]
    paged.cache[:, pages[:3]] = torch.nan
    paged.cache[:, pages[3], :3] = torch.nan
    assert_right(paged, [10], window=40)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_cache_of_8_bits(dtype):
    assert_right(paged_contexts([70, 33], dtype=dtype, size=96), [6, 33])


def test_a_long_row_takes_larger_tiles():
    assert_right(paged_contexts([150], kv_heads=1, dtype=torch.float16), [140], group=4)


def test_a_page_may_lie_behind_more_elements_than_32_bits_count():
    small = paged_contexts([90], kv_heads=1, dtype=torch.float16)
    # NOTE: 4 GiB of addresses; memory is taken where it is written.
    last = 2**31 // (2 * 16 * 64)
    large = torch.empty(last + len(small.cache[0]), 2, 16, 1, 64, dtype=torch.float16).transpose(0, 1)
    large[:, last:] = small.cache
    q, rows = torch.randn(5, 2, 64).half(), (small.slots, torch.tensor([0, 5]), small.lengths)
    expected = prefill_attention(q, small.cache, small.page_table, *rows, max_new=5)
    page_table = (small.page_table + last).int()
    assert torch.equal(prefill_attention(q, large, page_table, *rows, max_new=5), expected)


def test_a_row_that_is_not_finite_spoils_no_other():
    paged = paged_contexts([20, 20], kv_heads=1)
    paged.cache[1, paged.page_table[paged.slots[0], 0], 3] = torch.nan
    q, starts = torch.randn(12, 2, 64), torch.tensor([0, 6, 12])
    out = prefill_attention(q, paged.cache, paged.page_table, paged.slots, starts, paged.lengths, max_new=6)
    assert out[:6].isnan().all() and out[6:].isfinite().all()
