"""Distributions learned while running."""

from __future__ import annotations

import json
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.scheduler.spread import FORGET_AT, HIGHEST, MAX_KEYS, MAX_NAME, REMEMBERED, Spread, Spreads

SECONDS = st.floats(0, 10 * HIGHEST)
NAMES = st.text(max_size=3)


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


def later(spread: Spread) -> Spread:
    """The spread in another run, by way of a file."""
    return Spread.from_json(json.loads(json.dumps(spread.to_json())))


@given(st.lists(SECONDS, max_size=REMEMBERED), SECONDS, st.floats(0, 1))
def test_a_few_values_are_kept_between_runs_exactly(values, elapsed, share):
    before = filled(values)
    after = later(before)
    assert after.remaining(elapsed) == before.remaining(elapsed)
    assert (after.count, after.mean(), after.quantile(share)) == (before.count, before.mean(), before.quantile(share))


@given(st.lists(st.floats(0.01, 1e4), min_size=REMEMBERED, max_size=600), st.floats(0.05, 0.95))
def test_many_values_are_kept_between_runs_as_a_few_of_the_same_shape(values, share):
    before = filled(values)
    after = later(before)
    assert after.count == pytest.approx(REMEMBERED)
    assert after.mean() == pytest.approx(before.mean())
    low, high = (before.quantile(share + margin) for margin in (-1e-6, 1e-6))
    assert low * (1 - 1e-6) <= after.quantile(share) <= high * (1 + 1e-6)
    half = before.quantile(0.5)
    assert after.remaining(half) == pytest.approx(before.remaining(half))


def test_what_changed_between_runs_is_learned_anew_from_as_many_values_as_are_remembered():
    spread = later(filled([100.0] * 4000))
    for _ in range(REMEMBERED):
        spread.add(1.0)
    assert spread.mean() == pytest.approx(50.5)


def test_a_spread_that_has_forgotten_for_years_can_be_kept(monkeypatch):
    monkeypatch.setattr("treadle.scheduler.spread.FORGET_AT", 8)
    spread = filled([100.0] + [1.0] * 4300)
    assert 0 < min(count for count in spread._counts if count) < 1e-310
    assert later(spread).mean() == pytest.approx(1.0)


@given(st.lists(st.tuples(NAMES, NAMES, SECONDS), max_size=40), st.lists(st.tuples(NAMES, NAMES)))
def test_every_name_expects_the_same_in_the_next_run(values, asked):
    before = Spreads()
    for kind, name, value in values:
        before.add((kind, name), value)
    after = Spreads.from_json(json.loads(json.dumps(before.to_json())))
    for key in [*asked, *((kind, name) for kind, name, _ in values)]:
        assert after.of(key).mean() == before.of(key).mean()
    assert after.to_json() == before.to_json()


def test_names_too_long_for_a_file_are_left_out_of_it():
    spreads = Spreads()
    for name in ("short", "x" * (MAX_NAME + 1)):
        for _ in range(20):
            spreads.add(("agent", name), float(len(name)))
    after = Spreads.from_json(spreads.to_json())
    assert [name for _, name, _ in after.to_json()["names"]] == ["short", ""]


def test_of_too_many_names_those_learned_of_last_go_to_the_next_run():
    spreads = Spreads()
    for index in range(3 * MAX_KEYS):
        spreads.add((f"kind {index}", ""), 1.0)
    rows = Spreads.from_json(spreads.to_json()).to_json()["names"]
    assert [kind for kind, _, _ in rows] == [f"kind {index}" for index in range(2 * MAX_KEYS, 3 * MAX_KEYS)]


@pytest.mark.parametrize(
    "bins",
    [
        None,
        {},
        "text",
        [7],
        [[1, 1.0]],
        [[-1, 1.0, 0.001]],
        [[124, 1.0, 3e6]],
        [["0", 1.0, 0.001]],
        [[0, 0, 0]],
        [[0, -1.0, -0.001]],
        [[0, float("nan"), 0.001]],
        [[0, float("inf"), 0.001]],
        [[0, 1.0, float("nan")]],
        [[0, 1.0, float("inf")]],
        [[0, 10**400, 10**400]],
        [[0, 1.0, 5.0]],
        [[0, 5.0, 0.001]],
    ],
    ids=repr,
)
def test_what_is_no_spread_is_refused(bins):
    with pytest.raises(ValueError, match="is not"):
        Spread.from_json(bins)
    with pytest.raises(ValueError, match="is not"):
        Spreads.from_json({"version": 1, "all": [], "names": [["agent", "search", bins]]})


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "not of version 1"),
        ({"all": [], "names": []}, "not of version 1"),
        ({"version": 2, "all": [], "names": []}, "not of version 1"),
        ({"version": 1, "names": []}, "not a list of bins"),
        ({"version": 1, "all": []}, "at most 1024"),
        ({"version": 1, "all": [], "names": [["agent", str(i), []] for i in range(MAX_KEYS + 1)]}, "at most 1024"),
        ({"version": 1, "all": [], "names": [["agent", "x" * (MAX_NAME + 1), []]]}, "at most 256 characters"),
        ({"version": 1, "all": [], "names": [["agent", 5, []]]}, "is not a kind, a name and bins"),
        ({"version": 1, "all": [], "names": [["agent"]]}, "is not a kind, a name and bins"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_are_no_spreads_is_refused_with_a_reason(values, text):
    with pytest.raises(ValueError, match=text):
        Spreads.from_json(values)
