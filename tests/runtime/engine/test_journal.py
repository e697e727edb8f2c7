"""Whenever an engine dies, a new one that is told the journal goes on as if nothing had happened."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.fake_engine import STEP_S, FakeEngine, oracle

from treadle.runtime.engine.journal import Journal
from treadle.scheduler import (
    AbortCall,
    AppendPrompt,
    CallFinished,
    DeclareNode,
    EndProgram,
    Inspect,
    Inspected,
    OpenProgram,
    Prepare,
    Prepared,
    ProgramEnded,
    Rejected,
    Resume,
    SamplingParams,
    SchedulerConfig,
    SubmitCall,
    TokensOut,
    Wait,
    Watch,
)

VOCAB = 7
STOP = SamplingParams(stop_token_ids=(3,))
CONFIG = SchedulerConfig(
    num_pages=40, vocab_size=VOCAB, max_context=120, page_size=4, num_slots=4, max_step_tokens=16, max_programs=6
)
PROMPTS = st.lists(st.integers(0, 1), min_size=0, max_size=40)


class Mortal:
    """An engine behind a journal. What it says may still be on its way when it dies: then nobody hears it."""

    def __init__(self, config=CONFIG, *, ahead=False):
        self.config, self.ahead = config, ahead
        self.journal = Journal()
        self.engine = FakeEngine(config, ahead=ahead)
        self.heard = []
        self.tokens, self.finished, self.ended, self.rejected = {}, {}, {}, []

    def send(self, *commands):
        for command in commands:
            self.journal.sent(command, self.engine.now)
        self.engine.send(*commands)

    def hear(self):
        """What the engine said reaches its owner."""
        events, self.engine.events = self.engine.events, []
        for event in events:
            event = self.journal.came(event, self.engine.now)
            self.heard.append(event)
            match event:
                case TokensOut():
                    assert event.call_id not in self.finished, "tokens after the end"
                    self.tokens.setdefault(event.call_id, []).extend(event.token_ids)
                case CallFinished():
                    assert event.call_id not in self.finished, "ended twice"
                    self.finished[event.call_id] = event
                case ProgramEnded():
                    assert event.program_id not in self.ended, "ended twice"
                    self.ended[event.program_id] = event
                case Rejected():
                    self.rejected.append(event)

    def die(self):
        now = self.engine.now
        self.heard += self.journal.died()
        self.engine = FakeEngine(self.config, ahead=self.ahead)
        self.engine.now = now
        self.engine.send(*self.journal.replay(now))

    def steps(self, count):
        for _ in range(count):
            self.engine.step()
        self.engine.scheduler.check_integrity()

    def run(self):
        self.engine.run()
        self.hear()

    def assert_nothing_is_left(self):
        memory = self.engine.scheduler.memory
        assert memory.num_available == self.config.num_pages
        assert self.journal.num_calls == 0
        assert self.journal.replay(0.0) == []


class MortalMachine(RuleBasedStateMachine):
    """Random commands, steps and deaths."""

    @initialize(ahead=st.booleans())
    def begin(self, ahead):
        self.mortal = Mortal(ahead=ahead)
        self.ids = itertools.count()
        self.programs, self.open = [], []
        self.submitted, self.prompts = {}, {}

    def submit_command(self, command):
        self.submitted[command.call_id] = command
        self.prompts[command.call_id] = list(command.token_ids)
        self.mortal.send(command)

    @rule(tenant=st.sampled_from(["", "other"]))
    def open_program(self, tenant):
        self.programs.append(f"p{next(self.ids)}")
        self.mortal.send(OpenProgram(self.programs[-1], tenant=tenant))

    @precondition(lambda self: self.programs)
    @rule(data=st.data())
    def open_a_program_twice(self, data):
        self.mortal.send(OpenProgram(data.draw(st.sampled_from(self.programs))))

    @precondition(lambda self: self.programs)
    @rule(data=st.data(), prompt=PROMPTS, is_open=st.booleans(), max_tokens=st.integers(0, 12) | st.none())
    def submit(self, data, prompt, is_open, max_tokens):
        program, call = data.draw(st.sampled_from(self.programs)), f"c{next(self.ids)}"
        self.submit_command(SubmitCall(call, program, tuple(prompt), STOP, max_tokens, open=is_open))
        if is_open:
            self.open.append(call)

    @precondition(lambda self: self.submitted)
    @rule(data=st.data(), more=PROMPTS, is_fork=st.booleans())
    def go_on(self, data, more, is_fork):
        before = data.draw(st.sampled_from(list(self.submitted)))
        base, call = self.submitted[before], f"c{next(self.ids)}"
        if is_fork:
            prompt, how = self.prompts[before], {"fork_of": before}
        else:
            prompt, how = [*self.prompts[before], *self.mortal.tokens.get(before, []), *more], {"extends": before}
        self.submit_command(SubmitCall(call, base.program_id, tuple(prompt), STOP, 5, **how))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), more=PROMPTS, close=st.booleans())
    def append(self, data, more, close):
        call = data.draw(st.sampled_from(self.open))
        self.prompts[call] += more
        self.mortal.send(AppendPrompt(call, tuple(more), close=close))
        if close:
            self.open.remove(call)

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def abort(self, data):
        self.mortal.send(AbortCall(data.draw(st.sampled_from(list(self.submitted)))))

    @precondition(lambda self: self.programs)
    @rule(data=st.data())
    def end_program(self, data):
        program = data.draw(st.sampled_from(self.programs))
        self.programs.remove(program)
        self.mortal.send(EndProgram(program))

    @rule(count=st.integers(1, 20))
    def steps(self, count):
        self.mortal.steps(count)

    @rule()
    def hear(self):
        self.mortal.hear()

    @rule()
    def die(self):
        self.mortal.die()

    def teardown(self):
        if not hasattr(self, "mortal"):
            return
        for call in self.open:
            self.prompts[call].append(1)
            self.mortal.send(AppendPrompt(call, (1,), close=True))
        self.mortal.run()
        self.mortal.send(*map(EndProgram, self.programs))
        self.mortal.run()
        for call, command in self.submitted.items():
            self.has_ended_rightly(self.mortal.finished[call], self.mortal.tokens.get(call, []), command)
        self.mortal.assert_nothing_is_left()

    def has_ended_rightly(self, end, tokens, command):
        prompt = self.prompts[command.call_id]
        expected = oracle(prompt, command.max_tokens or 1000, VOCAB, frozenset({3}))
        assert tokens == expected[: len(tokens)]
        if end.reason in ("stop", "length"):
            assert tokens[-1] == 3 or len(tokens) == (command.max_tokens or CONFIG.max_context - len(prompt))
            assert end.usage.decoded == len(tokens)
            assert end.usage.cached + end.usage.prefilled == len(prompt)
        elif end.reason == "error":
            assert not tokens


TestMortal = pytest.mark.filterwarnings("ignore")(MortalMachine.TestCase)
TestMortal.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture
def mortal():
    return Mortal()


def test_an_attempt_to_open_a_program_twice_takes_nothing_from_its_calls(mortal):
    mortal.send(OpenProgram("p"), SubmitCall("c", "p", (0,), STOP, 8))
    mortal.steps(1)
    mortal.send(OpenProgram("p"), EndProgram("p"))
    mortal.die()
    mortal.run()
    assert mortal.finished["c"].error is None and mortal.ended["p"].calls == 1
    assert [event.error for event in mortal.rejected] == ["duplicate_id"]
    mortal.assert_nothing_is_left()


def test_the_account_of_a_program_covers_the_life_before_its_engine(mortal):
    undisturbed = Mortal()
    for each, dies in ((undisturbed, False), (mortal, True)):
        each.send(OpenProgram("p"), DeclareNode("p", "ask", "llm", "ask"), DeclareNode("p", "look", "tool", "look"))
        each.send(SubmitCall("ask", "p", (1, 2), max_tokens=4, node_id="ask"))
        each.run()
        each.send(Wait("p", "look"))
        each.engine.now += 10.0
        if dies:
            each.die()
        each.engine.now += 5.0
        each.send(Resume("p", "look"), EndProgram("p"))
        each.run()
    ended, expected = mortal.ended["p"], undisturbed.ended["p"]
    assert (ended.calls, ended.usage, ended.nodes) == (expected.calls, expected.usage, expected.nodes)
    assert ended.duration_s == pytest.approx(expected.duration_s, abs=2 * STEP_S)
    assert ended.tool_wait_s == pytest.approx(15.0)
    assert ended.critical_path == expected.critical_path


def test_a_new_engine_knows_what_a_program_waits_for_and_since_when(mortal):
    mortal.send(OpenProgram("p", due_s=60.0), DeclareNode("p", "look", "tool", "look"), Wait("p", "look"))
    mortal.engine.now += 40.0
    mortal.die()
    mortal.engine.now += 2.0
    mortal.send(Inspect("r", "p"))
    mortal.hear()
    (inspected,) = [event for event in mortal.heard if isinstance(event, Inspected)]
    program = inspected.report["programs"]["p"]
    assert program["state"] == "outside"
    assert program["outside"] == {"look": pytest.approx(42.0)}
    assert program["due_in_s"] == pytest.approx(18.0)


def test_what_was_learned_of_a_tool_does_not_depend_on_a_death_in_between(mortal):
    mortal.send(OpenProgram("p"), DeclareNode("p", "look", "tool", "look"), Wait("p", "look"))
    mortal.engine.now += 40.0
    mortal.die()
    mortal.engine.now += 2.0
    mortal.send(Resume("p", "look"))
    assert mortal.engine.scheduler.books.durations.of(("", "look")).mean() == pytest.approx(42.0, rel=0.3)


def test_requests_and_watches_outlive_an_engine(mortal):
    mortal.send(OpenProgram("p"), Watch(True), Inspect("first"))
    mortal.hear()
    mortal.send(Inspect("second"))
    mortal.die()
    mortal.send(SubmitCall("c", "p", (1, 2), max_tokens=2))
    mortal.run()
    assert [event.request_id for event in mortal.heard if isinstance(event, Inspected)] == ["first", "second"]
    assert "admit" in [decision.action for decision in mortal.engine.scheduler.take_decided().decisions]
    mortal.send(Watch(False))
    mortal.die()
    mortal.send(AbortCall("c"), EndProgram("p"))
    mortal.run()
    assert mortal.engine.scheduler.take_decided() is None
    mortal.assert_nothing_is_left()


def test_a_grammar_that_two_engines_died_over_is_not_given_to_a_third():
    journal = Journal()
    journal.sent(Prepare("bad", "{}"), 0.0)
    assert journal.died() == []
    assert journal.replay(0.0) == [Prepare("bad", "{}")]
    journal.sent(Prepare("good", "{}"), 0.0)
    (answer,) = journal.died()
    assert (answer.request_id, "died twice" in answer.error) == ("bad", True)
    assert journal.replay(0.0) == [Prepare("good", "{}")]
    journal.came(Prepared("good"), 0.0)
    assert journal.died() == journal.replay(0.0) == []


def test_a_grammar_that_took_too_long_is_not_given_to_the_next_engine():
    journal = Journal()
    journal.sent(Prepare("slow", "{}"), 0.0)
    journal.came(Rejected("slow", "overloaded", "it did not compile"), 0.0)
    assert journal.died() == journal.replay(0.0) == []


def test_a_program_whose_end_was_asked_for_ends_after_a_death(mortal):
    mortal.send(OpenProgram("p"), SubmitCall("c", "p", (1, 2), max_tokens=90), EndProgram("p"), EndProgram("nobody"))
    mortal.die()
    mortal.run()
    assert mortal.finished["c"].reason == "aborted"
    assert mortal.ended.keys() == {"p"}
    assert [(event.subject, event.error) for event in mortal.rejected] == [("nobody", "unknown_program")]
    mortal.assert_nothing_is_left()


def test_an_id_that_is_used_again_keeps_its_owners_apart(mortal):
    mortal.send(OpenProgram("p", "old"), SubmitCall("old", "p", (1, 2), max_tokens=90), EndProgram("p"))
    mortal.send(OpenProgram("p", "new"), SubmitCall("new", "p", (1, 2), STOP, 5))
    mortal.die()
    mortal.run()
    assert mortal.finished["old"].reason == "aborted"
    assert mortal.tokens["new"] == oracle((1, 2), 5, VOCAB, frozenset({3}))
    mortal.send(Inspect("r"))
    mortal.hear()
    assert mortal.heard[-1].report["programs"]["p"]["kind"] == "new"


def test_what_an_engine_refuses_is_not_told_to_the_next(mortal):
    mortal.send(*(OpenProgram(f"p{index}") for index in range(8)), OpenProgram("late", due_s=float("inf")))
    mortal.hear()
    assert [event.error for event in mortal.rejected] == ["overloaded", "overloaded", "overloaded"]
    opened = [command.program_id for command in mortal.journal.replay(0.0) if isinstance(command, OpenProgram)]
    assert opened == [f"p{index}" for index in range(6)]
