"""Random commands and steps: pages are conserved, every call ends with its tokens, and a rerun decides the same."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.fake_engine import FakeEngine, oracle

from treadle.scheduler import (
    AbortCall,
    AppendPrompt,
    EndProgram,
    Hint,
    OpenProgram,
    SamplingParams,
    SchedulerConfig,
    SubmitCall,
)

VOCAB = 7
PROMPTS = st.lists(st.integers(0, 1), min_size=0, max_size=40)


class SchedulerMachine(RuleBasedStateMachine):
    """Drives one engine, and remembers what it did so that it can be done again."""

    @initialize(
        ahead=st.booleans(),
        order=st.sampled_from(["fcfs", "program-fcfs", "plas:0.02", "atlas:0.02", "continuum", "treadle"]),
        retention=st.sampled_from(["lru", "fixed:0.05", "continuum", "continuum-released:0.5", "treadle"]),
        admission=st.sampled_from(["greedy", "pause-resume", "aimd", "treadle"]),
        num_host_pages=st.sampled_from([0, 5, 60]),
        max_step_moves=st.sampled_from([1, 3, 100]),
        num_pages=st.integers(8, 40),
        num_slots=st.integers(1, 6),
        max_step_tokens=st.sampled_from([3, 16, 64]),
        prefix_cache=st.booleans(),
    )
    def begin(self, ahead, num_pages, num_slots, max_step_tokens, prefix_cache, **choices):
        config = SchedulerConfig(
            num_pages=num_pages,
            vocab_size=VOCAB,
            max_context=120,
            page_size=4,
            num_slots=num_slots,
            max_step_tokens=max_step_tokens,
            **choices,
            prefix_cache=prefix_cache,
        )
        self.config, self.ahead = config, ahead
        self.engine = FakeEngine(config, ahead=ahead)
        self.history = []
        self.ids = itertools.count()
        self.programs: list[str] = []
        self.submitted: dict[str, SubmitCall] = {}
        self.prompts: dict[str, list[int]] = {}
        self.open: list[str] = []

    def send(self, command):
        self.history.append(command)
        return self.engine.send(command)

    def live(self) -> list[str]:
        return [call for call in self.submitted if call not in self.engine.finished]

    @rule(tenant=st.sampled_from(["", "other"]), priority=st.integers(0, 1), due_s=st.sampled_from([1.0, 600.0]))
    def open_program(self, tenant, priority, due_s):
        program = f"p{next(self.ids)}"
        self.programs.append(program)
        assert self.send(OpenProgram(program, tenant=tenant, priority=priority, due_s=due_s)) == []

    @precondition(lambda self: self.programs)
    @rule(data=st.data(), prompt=PROMPTS, is_open=st.booleans(), max_tokens=st.integers(1, 12) | st.none())
    def submit(self, data, prompt, is_open, max_tokens):
        program = data.draw(st.sampled_from(self.programs))
        call = f"c{next(self.ids)}"
        stop = SamplingParams(stop_token_ids=(3,))
        command = SubmitCall(call, program, tuple(prompt), stop, max_tokens, open=is_open)
        self.submitted[call] = command
        self.prompts[call] = list(prompt)
        self.send(command)
        if is_open and call not in self.engine.finished:
            self.open.append(call)

    @precondition(lambda self: self.submitted)
    @rule(data=st.data(), more=PROMPTS, max_tokens=st.integers(1, 12))
    def extend(self, data, more, max_tokens):
        before = data.draw(st.sampled_from(list(self.submitted)))
        base = self.submitted[before]
        prompt = [*self.prompts[before], *self.engine.tokens.get(before, []), *more]
        call = f"c{next(self.ids)}"
        command = SubmitCall(call, base.program_id, tuple(prompt), base.sampling, max_tokens, extends=before)
        self.submitted[call] = command
        self.prompts[call] = prompt
        self.send(command)

    @precondition(lambda self: self.live())
    @rule(data=st.data(), count=st.integers(1, 3))
    def fork(self, data, count):
        parent = data.draw(st.sampled_from(self.live()))
        for _ in range(count):
            call = f"c{next(self.ids)}"
            base = self.submitted[parent]
            command = SubmitCall(
                call, base.program_id, tuple(self.prompts[parent]), base.sampling, base.max_tokens, fork_of=parent
            )
            self.submitted[call] = command
            self.prompts[call] = list(self.prompts[parent])
            self.send(command)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), more=PROMPTS, close=st.booleans())
    def append(self, data, more, close):
        call = data.draw(st.sampled_from(self.open))
        if call in self.engine.finished:
            self.open.remove(call)
            return
        self.prompts[call] += more
        self.send(AppendPrompt(call, tuple(more), close=close))
        if close:
            self.open.remove(call)

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def abort(self, data):
        self.send(AbortCall(data.draw(st.sampled_from(list(self.submitted)))))

    @precondition(lambda self: self.programs)
    @rule(
        data=st.data(), action=st.sampled_from(["retain", "demote", "release"]), seconds=st.sampled_from([0.05, 99.0])
    )
    def hint(self, data, action, seconds):
        (answer,) = self.send(Hint("h", data.draw(st.sampled_from(self.programs)), action, seconds))
        assert (answer.outcome == "granted") or answer.reason

    @precondition(lambda self: self.programs)
    @rule(data=st.data())
    def end_program(self, data):
        program = data.draw(st.sampled_from(self.programs))
        self.programs.remove(program)
        self.send(EndProgram(program))

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def fail(self, data):
        call = data.draw(st.sampled_from(self.live()))
        self.history.append(("fail", call))
        self.engine.fail_calls.add(call)

    @rule(count=st.integers(1, 20))
    def steps(self, count):
        for _ in range(count):
            self.history.append("step")
            self.engine.step()
            self.engine.scheduler.check_integrity()

    @invariant()
    def nothing_is_inconsistent(self):
        if hasattr(self, "engine"):
            self.engine.scheduler.check_integrity()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for call in self.open:
            if call not in self.engine.finished:
                self.send(AppendPrompt(call, (1,), close=True))
                self.prompts[call].append(1)
        self.history.append("run")
        self.engine.run()
        self.engine.scheduler.check_integrity()
        self.every_call_ended_rightly()
        for program in self.programs:
            self.send(EndProgram(program))
        self.the_pool_is_whole()
        self.a_rerun_decides_the_same()

    def every_call_ended_rightly(self):
        for call, command in self.submitted.items():
            end = self.engine.finished[call]
            tokens = self.engine.tokens.get(call, [])
            limit = command.max_tokens or 1000
            expected = oracle(self.prompts[call], limit, VOCAB, frozenset({3}))
            assert tokens == expected[: len(tokens)]
            if end.reason == "stop":
                assert tokens[-1] == 3
            elif end.reason == "length":
                assert len(tokens) == (
                    command.max_tokens or self.engine.scheduler.limits.max_context - len(self.prompts[call])
                )
            assert end.usage.decoded == len(tokens)
            if end.reason in ("stop", "length"):
                assert end.usage.cached + end.usage.prefilled == len(self.prompts[call])

    def the_pool_is_whole(self):
        memory = self.engine.scheduler.memory
        assert memory.num_available == self.config.num_pages
        assert memory.num_deferred == 0

    def a_rerun_decides_the_same(self):
        again = FakeEngine(self.config, ahead=self.ahead)
        for entry in self.history:
            if entry == "step":
                again.step()
            elif entry == "run":
                again.run()
            elif isinstance(entry, tuple):
                again.fail_calls.add(entry[1])
            else:
                again.send(entry)
        assert again.scheduler.decisions == self.engine.scheduler.decisions
        assert again.plans == self.engine.plans
        assert again.events == self.engine.events


TestScheduler = pytest.mark.filterwarnings("ignore")(SchedulerMachine.TestCase)
TestScheduler.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
