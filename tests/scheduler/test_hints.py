"""Hints: they move who keeps pages under pressure, are answered by what was done, and never change a result."""

from __future__ import annotations

import pytest
from support.fake_engine import FakeEngine

from treadle.scheduler import EndProgram, Hint, HintAnswered, OpenProgram, SchedulerConfig, SubmitCall
from treadle.scheduler.config import Costs


def engine(**settings) -> FakeEngine:
    base = {"num_pages": 32, "vocab_size": 10_000, "max_context": 124, "page_size": 4, "num_slots": 8}
    return FakeEngine(SchedulerConfig(**{**base, "costs": Costs(0.1, 0.001, 0.001), **settings}))


def turn(driver: FakeEngine, program: str, first: int, length: int) -> None:
    """One whole turn of a program; its pages come to rest with it."""
    driver.send(OpenProgram(program), SubmitCall(f"{program}/0", program, prompt(first, length), max_tokens=1))
    driver.run()


def prompt(first: int, length: int) -> tuple[int, ...]:
    return (first, *range(1000, 999 + length))


def hint(driver: FakeEngine, program: str, action: str, seconds: float = 0.0) -> HintAnswered:
    (answer,) = driver.send(Hint("h", program, action, seconds))
    driver.scheduler.check_integrity()
    return answer


def cached(driver: FakeEngine, program: str, first: int, length: int) -> int:
    """Tokens that the next turn of a program finds."""
    driver.send(
        SubmitCall(f"{program}/1", program, (*prompt(first, length), 7, 8), max_tokens=1, extends=f"{program}/0")
    )
    driver.run()
    return driver.finished[f"{program}/1"].usage.cached


def test_a_demoted_program_gives_way_before_others():
    """Without the hint the younger program would give way: the older one goes first in every order."""
    kept = {}
    for demoted in (False, True):
        driver = engine()
        turn(driver, "old", 1, 56)
        turn(driver, "young", 2, 56)
        if demoted:
            assert hint(driver, "old", "demote").outcome == "granted"
        turn(driver, "press", 3, 40)
        kept[demoted] = cached(driver, "old", 1, 56) >= 52
    assert kept == {False: True, True: False}


def test_a_retained_program_is_kept_beyond_the_pause_that_is_worth_waiting_for():
    kept = {}
    for seconds in (0.0, 3000.0):
        driver = engine()
        turn(driver, "away", 1, 56)
        if seconds:
            answer = hint(driver, "away", "retain", seconds)
            assert (answer.outcome, answer.num_tokens, answer.seconds) == ("granted", 56, seconds)
        driver.now += 2000.0
        turn(driver, "busy", 2, 56)
        turn(driver, "press", 3, 40)
        kept[seconds] = cached(driver, "away", 1, 56) >= 52
    assert kept == {0.0: False, 3000.0: True}


def test_retention_is_over_when_its_time_is():
    driver = engine()
    turn(driver, "away", 1, 56)
    hint(driver, "away", "retain", 10.0)
    driver.now += 2000.0
    turn(driver, "busy", 2, 56)
    turn(driver, "press", 3, 40)
    assert cached(driver, "away", 1, 56) < 52


def test_what_is_released_goes_first_and_the_program_goes_on_regardless():
    driver = engine()
    turn(driver, "done", 1, 56)
    turn(driver, "other", 2, 56)
    assert hint(driver, "done", "release").num_tokens == 56
    assert not driver.scheduler.books.programs["done"].leases
    turn(driver, "press", 3, 40)
    assert cached(driver, "other", 2, 56) >= 52
    assert cached(driver, "done", 1, 56) < 52


def test_a_hint_is_over_when_the_program_comes_back():
    driver = engine(num_pages=64)
    turn(driver, "agent", 1, 40)
    hint(driver, "agent", "demote")
    cached(driver, "agent", 1, 40)
    assert not any(lease.is_demoted for lease in driver.scheduler.books.leases.values())


def test_hints_retain_no_more_than_half_of_all_pages():
    driver = engine()
    turn(driver, "a", 1, 60)
    turn(driver, "b", 2, 60)
    assert hint(driver, "a", "retain", 60.0).outcome == "granted"
    refused = hint(driver, "b", "retain", 60.0)
    assert refused.outcome == "dropped" and "50%" in refused.reason
    assert hint(driver, "a", "retain", 90.0).outcome == "granted", "what a program retains itself does not count twice"


def test_pages_are_retained_for_an_hour_at_most():
    driver = engine()
    turn(driver, "a", 1, 40)
    answer = hint(driver, "a", "retain", 1e9)
    assert (answer.outcome, answer.seconds) == ("clipped", 3600.0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_time_that_is_none_is_dropped(seconds):
    driver = engine()
    turn(driver, "a", 1, 40)
    assert hint(driver, "a", "retain", seconds).outcome == "dropped"


def test_a_hint_for_nothing_says_so():
    driver = engine()
    assert "not open" in hint(driver, "nobody", "retain", 1.0).reason
    driver.send(OpenProgram("p"))
    assert "come to rest" in hint(driver, "p", "retain", 1.0).reason
    assert hint(driver, "p", "release").num_tokens == 0


def test_a_policy_that_knows_no_pauses_says_so():
    driver = engine(retention="lru", order="fcfs", admission="greedy")
    turn(driver, "a", 1, 40)
    answer = hint(driver, "a", "retain", 60.0)
    assert answer.outcome == "dropped" and "lru" in answer.reason
    assert hint(driver, "a", "release").outcome == "granted"


def test_retained_pages_never_keep_a_call_from_running():
    """Two programs have hints on everything that may be retained, and a call wants the whole pool."""
    driver = engine()
    for index in range(2):
        turn(driver, f"p{index}", index, 28)
        hint(driver, f"p{index}", "retain", 3600.0)
    turn(driver, "large", 9, 120)
    assert driver.finished["large/0"].reason == "length"


def test_answers_are_in_the_log():
    driver = engine()
    turn(driver, "a", 1, 40)
    hint(driver, "a", "retain", 60.0)
    line = driver.scheduler.decisions[-1]
    assert (line.action, line.subject, line.reason) == ("retain", "a", "granted, 40 tokens for 60 s")
    driver.send(EndProgram("a"))
    assert not driver.scheduler.books.leases
