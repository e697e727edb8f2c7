"""Distributions learned while running."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.scheduler.spread import FORGET_AT, MAX_KEYS, Spread, Spreads


def filled(values) -> Spread:
    spread = Spread()
    for value in values:
        spread.add(value)
    return spread


@given(st.lists(st.floats(0.002, 1e5), min_size=1, max_size=200))
def test_the_mean_is_exact(values):
    assert filled(values).mean() == pytest.approx(statistics.mean(values))


@pytest.mark.parametrize("elapsed", [0.0, 1.0, 5.0, 30.0])
def test_what_remains_is_that_of_the_values_above(elapsed):
    rng = random.Random(0)
    values = [rng.lognormvariate(1, 2) for _ in range(4000)]
    above = [value - elapsed for value in values if value > elapsed]
    assert filled(values).remaining(elapsed) == pytest.approx(statistics.mean(above), rel=0.1)


def test_a_fixed_time_counts_down():
    spread = filled([10.0] * 50)
    assert spread.remaining(0) == pytest.approx(10, rel=0.01)
    assert spread.remaining(8) < 3


def test_beyond_everything_seen_it_takes_as_long_again():
    assert filled([1.0] * 50).remaining(40.0) == 40.0
    assert Spread().remaining(3.0) == 3.0


@given(st.lists(st.floats(0.01, 1e4), min_size=20, max_size=200), st.floats(0.05, 0.95))
def test_a_quantile_is_right_to_the_width_of_a_bin(values, share):
    found = filled(values).quantile(share)
    assert sum(value <= found * 1.2 for value in values) >= share * len(values)
    assert sum(value < found / 1.2 for value in values) <= share * len(values)


def test_old_values_are_forgotten():
    spread = filled([1.0] * FORGET_AT + [100.0] * FORGET_AT)
    assert spread.mean() > 60
    assert spread.count < FORGET_AT


def test_an_unknown_key_falls_back_to_its_kind_and_then_to_all():
    spreads = Spreads()
    for _ in range(20):
        spreads.add(("agent", "search"), 4.0)
        spreads.add(("other", "sleep"), 400.0)
    assert spreads.of(("agent", "search")).mean() == pytest.approx(4)
    assert spreads.of(("agent", "new tool")).mean() == pytest.approx(4)
    assert spreads.of(("new kind", "new tool")).mean() == pytest.approx(202)


def test_what_was_said_to_be_typical_gives_way_to_what_is_seen():
    spreads = Spreads()
    spreads.expect(("agent", "build"), 60.0)
    assert spreads.of(("agent", "build")).remaining(0) == pytest.approx(60)
    for _ in range(100):
        spreads.add(("agent", "build"), 1.0)
    assert spreads.of(("agent", "build")).remaining(0) < 7


def test_names_are_bounded():
    spreads = Spreads()
    for index in range(3 * MAX_KEYS):
        spreads.add(("agent", f"tool {index}"), 1.0)
    assert len(spreads._spreads) == MAX_KEYS
    assert spreads.of(("agent", "whatever")).count > MAX_KEYS


def test_a_new_name_takes_the_place_of_that_unused_longest():
    spreads = Spreads()
    for index in range(2 * MAX_KEYS):
        spreads.add(("agent", "in use"), 3.0)
        spreads.add(("agent", f"tool {index}"), 1.0)
    assert spreads.of(("agent", "in use")).mean() == 3.0
    spreads.expect(("agent", "new"), 7.0)
    assert spreads.of(("agent", "new")).mean() == 7.0
