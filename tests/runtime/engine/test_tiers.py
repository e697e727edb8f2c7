"""Two tiers of memory: what goes to host memory comes back as it was, and nobody's tokens depend on it."""

from __future__ import annotations

import pytest
from support.engines import Bench, assert_same

from treadle.runtime.errors import InvalidRequestError
from treadle.scheduler import DeclareNode, EndProgram, OpenProgram, Resume, Wait
from treadle.scheduler.policies import ADMISSIONS, RETENTIONS

PROMPT = [(11 * i) % 400 for i in range(42)]
OTHER = [(13 * i + 5) % 400 for i in range(42)]


class Clock:
    """A time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("overlap", [False, True])
def test_a_page_comes_back_from_host_memory_as_it_went(overlap):
    bench = Bench(num_pages=16, host_pages=32, overlap=overlap, retention="lru", admission="greedy")
    bench.submit("call", PROMPT, max_tokens=2)
    bench.run()
    before = {tokens: kv for (_, tokens), kv in bench.page_bytes().items()}
    bench.submit("other", OTHER, max_tokens=2)
    bench.run()
    demoted = {tokens: kv for (tier, tokens), kv in bench.page_bytes().items() if tier == "host" and tokens in before}
    assert demoted and all(before[tokens] == kv for tokens, kv in demoted.items())

    bench.engine.runner.state.kv[:, :, bench.scheduler.memory.pool._free] = 7.0
    bench.submit("again", PROMPT, max_tokens=2)
    bench.run()

    after = bench.page_bytes()
    assert all(after["device", tokens] == kv for tokens, kv in demoted.items())
    assert bench.scheduler.memory.num_loaded >= len(demoted)
    assert bench.calls["again"].end.usage.cached >= 40
    assert bench.calls["again"].token_ids == bench.calls["call"].token_ids
    bench.assert_nothing_leaks()


def converse(bench, clock, *, programs=5, turns=3):
    """Conversations with pauses between their turns, each turn extending the tokens of the last."""
    prompts = {}
    for index in range(programs):
        bench.send(OpenProgram(f"p{index}"))
        prompts[index] = [*PROMPT[:12], *((17 * i + 31 * index) % 450 for i in range(12 + 3 * index))]
    pages = {}
    for turn in range(turns):
        for index in range(programs):
            if turn:
                bench.send(Resume(f"p{index}", f"pause {turn - 1}"))
            bench.submit(f"{index}/{turn}", prompts[index], program=f"p{index}", max_tokens=6 + index)
        while bench.step():
            clock.now += 0.01
            pages = assert_pages_are_as_they_were(bench, pages)
        for index in range(programs):
            prompts[index] += [*bench.calls[f"{index}/{turn}"].token_ids, 450 + turn, index, turn]
            bench.send(DeclareNode(f"p{index}", f"pause {turn}", "tool", "search"), Wait(f"p{index}", f"pause {turn}"))
            clock.now += 0.25
    for index in range(programs):
        bench.send(EndProgram(f"p{index}"))
    return bench.calls


def assert_pages_are_as_they_were(bench, before):
    """A page that was there before, in whichever tier, holds what it held. What was away may be computed anew."""
    now = bench.page_bytes()
    old = {tokens: kv for (_, tokens), kv in before.items()}
    assert all(old.get(tokens, kv) == kv for (_, tokens), kv in now.items())
    return now


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("admission", ADMISSIONS)
@pytest.mark.parametrize("retention", RETENTIONS)
def test_tokens_do_not_depend_on_a_host_tier(retention, admission, overlap):
    large = converse(Bench(), Clock())
    clock = Clock()
    bench = Bench(
        num_pages=28,
        host_pages=60,
        max_step_moves=5,
        max_step_tokens=24,
        retention=retention,
        admission=admission,
        overlap=overlap,
        clock=clock,
    )
    plans = recorded_plans(bench)
    outcomes = converse(bench, clock)
    for call_id, expected in large.items():
        assert_same(expected, outcomes[call_id])
    assert bench.scheduler.memory.num_saved > 0
    assert bench.scheduler.memory.num_loaded > 0
    assert all(max(len(plan.saves), len(plan.loads)) <= 5 for plan in plans)
    bench.assert_nothing_leaks()


def recorded_plans(bench):
    """Every plan that the engine carries out from now on."""
    state, plans = bench.engine.runner.state, []
    write = state.write

    def record(plan):
        plans.append(plan)
        write(plan)

    state.write = record
    return plans


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_may_consist_of_moves_alone(overlap):
    bench = Bench(num_pages=16, host_pages=32, max_step_moves=2, overlap=overlap, retention="lru", admission="greedy")
    plans = recorded_plans(bench)
    for call_id, prompt in (("call", PROMPT), ("other", OTHER), ("again", PROMPT)):
        bench.submit(call_id, prompt, max_tokens=2)
        bench.run()
    assert any(plan.loads and not plan.rows for plan in plans)
    assert bench.calls["again"].token_ids == bench.calls["call"].token_ids


@pytest.mark.parametrize(("option", "least"), [("host_pages", 0), ("max_step_moves", 1)])
def test_sizes_of_the_host_tier_that_cannot_be_are_refused(option, least):
    with pytest.raises(InvalidRequestError, match=f"{option} is {least - 1}; it must be at least {least}"):
        Bench(**{option: least - 1})


def test_a_host_tier_that_memory_cannot_hold_is_refused():
    with pytest.raises(InvalidRequestError, match=r"256 KV pages and 10+ host pages take .*; use fewer pages"):
        Bench(host_pages=10**12)
