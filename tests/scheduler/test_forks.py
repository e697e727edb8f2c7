"""Forks copy the unfinished page of their parent, and no copy of a step depends on another."""

from __future__ import annotations

from support.fake_engine import FakeEngine, oracle

from treadle.scheduler import OpenProgram, SchedulerConfig, SubmitCall

PROMPT = tuple(range(1, 24))
VOCABULARY = 100


def test_a_fork_of_a_fork_that_starts_with_it_copies_the_page_that_both_come_from():
    engine = FakeEngine(SchedulerConfig(vocab_size=VOCABULARY, num_pages=40, page_size=16, num_slots=8, max_context=64))
    plans = []
    execute = engine._execute
    engine._execute = lambda plan: (plans.append(plan), execute(plan))[1]
    engine.send(OpenProgram("program"))
    for name, parent in (("call", None), ("fork", "call"), ("fork of fork", "fork")):
        engine.send(SubmitCall(name, "program", PROMPT, max_tokens=6, fork_of=parent))
        if name == "fork of fork":
            scheduler = engine.scheduler
            scheduler._planner._preempt(scheduler._calls["fork"], "for the test", engine.now)
        else:
            engine.step()
    engine.run()
    assert any(len(plan.copies) == 2 for plan in plans), "the two start in one step"
    for plan in plans:
        sources, targets = ({pair[side] for pair in plan.copies} for side in (0, 1))
        assert not sources & targets
    expected = oracle(PROMPT, 6, VOCABULARY)
    assert all(engine.tokens[name] == expected for name in ("call", "fork", "fork of fork"))
