"""How many programs a decoding batch becomes, and that any number of heads fits into a tile."""

import pytest

from treadle.kernels.tiles import PROCESSORS, decode_splits, decode_tile, padded, prefill_tile


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("rows", [1, 2, 7, 33, 64, 500])
def test_splits_fill_the_device_without_a_third_round(rows, kv_heads):
    splits = decode_splits(rows, kv_heads)
    assert splits == padded(splits)
    assert splits == 1 or rows * kv_heads * splits <= 2 * PROCESSORS
    assert splits == 32 or rows * kv_heads * splits > PROCESSORS


@pytest.mark.parametrize("cache_bytes", [1, 2, 4])
@pytest.mark.parametrize("group", [1, 3, 24, 71])
def test_a_tile_holds_the_heads_of_a_group(group, cache_bytes):
    assert decode_tile(group, 128, cache_bytes).queries >= group
    assert prefill_tile(1, group, 128, cache_bytes).queries >= group
