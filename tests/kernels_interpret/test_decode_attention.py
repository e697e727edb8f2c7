"""One token a row against its paged context, as Triton's interpreter computes it, against the formula."""

import pytest
import torch
from kernels_interpret.paged import paged_contexts, query_type, tolerance

from treadle.kernels.decode import decode_attention

FP8 = torch.float8_e4m3fn


def assert_right(paged, *, group=2, num_splits=2, window=None, table_type=torch.int64, seed=1):
    kv_heads, size = paged.cache.shape[3:]
    dtype = query_type(paged.cache.dtype)
    q = torch.randn(len(paged.lengths), kv_heads * group, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    tables = paged.page_table.to(table_type), paged.slots.to(table_type)
    options = {"num_splits": num_splits, "window": window, "scales": paged.scales}
    out = decode_attention(q, paged.cache, *tables, paged.lengths, **options)
    for row, length in enumerate(paged.lengths.tolist()):
        if length == 0:
            assert torch.equal(out[row], torch.zeros_like(out[row]))
        else:
            expected = paged.attention(row, q[row], length - 1, window)
            torch.testing.assert_close(out[row], expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("page", [4, 16, 32, 64])
def test_sees_its_own_context_and_nothing_else(page, dtype):
    assert_right(paged_contexts([1, 64, 77, 130], page=page, dtype=dtype, seed=page))


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("size", [64, 96, 128])
def test_heads_of_any_group_and_size(size, group):
    assert_right(paged_contexts([75], kv_heads=2, size=size, seed=size), group=group)


@pytest.mark.parametrize("size", [16, 80, 256])
def test_heads_that_fill_no_block(size):
    assert_right(paged_contexts([41, 3], kv_heads=1, size=size), num_splits=1)


@pytest.mark.parametrize("num_splits", [1, 3, 8])
def test_splits_without_a_context_count_for_nothing(num_splits):
    assert_right(paged_contexts([100, 5], kv_heads=1), num_splits=num_splits)


def test_a_row_of_no_length_reads_nothing_and_gets_zero():
    assert_right(paged_contexts([0, 20, 0]))


@pytest.mark.parametrize("window", [1, 16, 50, 64, 1000])
def test_a_window_hides_what_is_older(window):
    assert_right(paged_contexts([12, 64, 130], kv_heads=1), window=window)


def test_what_fell_out_of_the_window_is_not_read():
    paged = paged_contexts([100], kv_heads=1)
    pages = paged.page_table[paged.slots[0]]
    paged.cache[:, pages[:3]] = torch.nan
    paged.cache[:, pages[3], :12] = torch.nan
    assert_right(paged, window=40)


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
def test_a_cache_of_8_bits(dtype):
    assert_right(paged_contexts([70, 1, 33], dtype=dtype, size=96))


def test_scales_may_be_float16():
    paged = paged_contexts([70], dtype=torch.int8)
    object.__setattr__(paged, "scales", paged.scales.half())
    assert_right(paged)


def test_tables_may_be_int32():
    assert_right(paged_contexts([70, 3]), table_type=torch.int32)


def test_queries_and_layers_need_not_be_contiguous():
    paged = paged_contexts([40, 9])
    arena = torch.full((2, *paged.cache.shape), torch.nan)
    arena[1] = paged.cache
    qkv = torch.randn(2, 8, 64)
    arguments = paged.page_table, paged.slots, paged.lengths
    out = decode_attention(qkv[:, :4], arena[1], *arguments, num_splits=2)
    assert torch.equal(out, decode_attention(qkv[:, :4].contiguous(), paged.cache, *arguments, num_splits=2))


def test_a_page_may_lie_behind_more_elements_than_32_bits_count():
    small = paged_contexts([20], kv_heads=1, dtype=torch.float16)
    # NOTE: 4 GiB of addresses; memory is taken where it is written.
    last = 2**31 // (2 * 16 * 64)
    large = torch.empty(last + len(small.cache[0]), 2, 16, 1, 64, dtype=torch.float16).transpose(0, 1)
    large[:, last:] = small.cache
    q, tables = torch.randn(1, 2, 64).half(), (small.slots, small.lengths)
    expected = decode_attention(q, small.cache, small.page_table, *tables, num_splits=1)
    page_table = (small.page_table + last).int()
    assert torch.equal(decode_attention(q, large, page_table, *tables, num_splits=1), expected)


def test_a_token_that_is_not_finite_shows():
    paged = paged_contexts([20, 20], kv_heads=1)
    paged.cache[1, paged.page_table[paged.slots[0], 0], 3] = torch.nan
    q = torch.randn(2, 2, 64)
    out = decode_attention(q, paged.cache, paged.page_table, paged.slots, paged.lengths, num_splits=2)
    assert out[0].isnan().all() and out[1].isfinite().all()
