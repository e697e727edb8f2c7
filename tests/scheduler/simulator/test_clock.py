"""The virtual clock: when calls begin and end, and what those who see the future are told."""

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from treadle.scheduler.simulator.bound import fluid_mean_s
from treadle.scheduler.simulator.clock import Setup, Simulation
from treadle.scheduler.simulator.hardware import CopyCost, Hardware, StepCost
from treadle.scheduler.simulator.presets import PRESETS, policy
from treadle.scheduler.simulator.workload import Blocks, CallSpec, ProgramSpec, Workload

SIZE = 16
# A step takes a second, whatever is in it: calls beside each other do not slow each other down.
MACHINE = Hardware(
    "a second a step",
    kv_bytes_per_token=1,
    step_tokens=1024,
    rows=64,
    step=StepCost(1.0, 0.0, 0.0, 0.0),
    copy=CopyCost(1e9, 1e9, 0.0),
    source="made up",
    validated=False,
)


def call(number, pause_s=0.0, kind="tool", stream="main", output=4, **more):
    """A call of `output` seconds, whose prompt nothing else begins with unless it has the same number."""
    return CallSpec(stream, Blocks(((1000 * number, 8),)), SIZE, output, pause_s, kind, **more)


def simulation_of(*programs, stopwatch=lambda: 0.0, machine=MACHINE, **setup):
    workload = Workload("w", SIZE, programs)
    return Simulation(workload, Setup(machine, 1024, page_tokens=SIZE, **setup), stopwatch)


def program(*calls, start_s=0.0):
    return ProgramSpec("p", "kind", start_s, calls, "p")


def fan(number, after, pause_s=0.0, kind="none", **more):
    """A call of a conversation of its own."""
    return call(number, pause_s, kind, stream=str(number), after=after, **more)


def events(simulation):
    """What was decided, as (second, action, call)."""
    return [(decision.time, decision.action, decision.subject) for decision in simulation.scheduler.decisions]


class TestCallsBesideEachOther:
    def test_begin_when_all_that_they_wait_for_has_ended_and_their_pause_is_over(self):
        plan = fan(0, ())
        short, long = fan(1, (0,), output=3), fan(2, (0,), 2.0, "tool", output=5)
        merge = fan(3, (1, 2), 1.0, output=2)
        simulation = simulation_of(program(plan, short, long, merge, start_s=10.0))
        (record,) = simulation.run().programs
        assert [(when, what) for when, what, _ in events(simulation) if what in ("admit", "finish")] == [
            *[(10.0, "admit"), (14.0, "finish")],
            *[(14.0, "admit"), (16.0, "admit"), (17.0, "finish"), (21.0, "finish")],
            *[(22.0, "admit"), (24.0, "finish")],
        ]
        assert (record.began, record.ended, record.alone_s) == (10.0, 24.0, 14.0)

    def test_begin_with_the_program_if_they_wait_for_nothing(self):
        simulation = simulation_of(program(fan(0, (), 5.0, "tool"), fan(1, ()), fan(2, (0,))))
        (record,) = simulation.run().programs
        admitted = [(when, name) for when, action, name in events(simulation) if action == "admit"]
        assert admitted == [(0.0, "p/1"), (5.0, "p/0"), (9.0, "p/2")]
        assert (record.ended, record.alone_s) == (13.0, 13.0)

    def test_take_alone_what_the_longest_chain_takes(self):
        one_at_a_time = replace(MACHINE, rows=1)
        simulation = simulation_of(program(fan(0, ()), fan(1, ()), fan(2, (1,), output=2)), machine=one_at_a_time)
        (record,) = simulation.run().programs
        assert (record.ended, record.alone_s) == (10.0, 6.0)

    @pytest.mark.parametrize(("foreseen", "first"), [(True, "p/1"), (False, "p/0")])
    def test_go_first_if_more_is_known_to_wait_for_them(self, foreseen, first):
        calls = (fan(0, ()), fan(1, ()), fan(2, (1,), foreseen=foreseen))
        simulation = simulation_of(program(*calls), machine=replace(MACHINE, rows=1), order="treadle")
        simulation.run()
        assert next(name for _, action, name in events(simulation) if action == "admit") == first

    def test_continue_what_they_extend(self):
        first = call(0, after=(), output=20)
        grown = replace(
            first, prompt=Blocks(((0, 16),)), prompt_tokens=40, after=(0,), pause_s=1.0, pause_kind="person"
        )
        outcome = simulation_of(program(first, grown, fan(7, (0,)))).run()
        # All but the last token that was generated is there again: the tail is taken over.
        assert outcome.cached == 16 + 20 - 1
        assert outcome.new == 16 + 4 + 16


@st.composite
def programs_of_graphs(draw):
    """Programs whose calls wait for any calls before them, and may go on with a conversation whose last one it is."""
    found = []
    for number in range(draw(st.integers(1, 4))):
        calls = []
        for index in range(draw(st.integers(1, 7))):
            after = tuple(sorted(draw(st.sets(st.integers(0, index - 1), max_size=3)))) if index else ()
            free = [one for one in after if one == max(i for i, c in enumerate(calls) if c.stream == calls[one].stream)]
            extended = draw(st.sampled_from([None, *free]))
            start = 100 * (10 * number + index)
            prompt, tokens, stream = Blocks(), 0, str(index)
            if extended is not None:
                prompt, tokens, stream = calls[extended].prompt, calls[extended].prompt_tokens, calls[extended].stream
            pause_s, kind = draw(st.sampled_from([(0.0, "none"), (0.25, "none"), (0.0, "tool"), (3.0, "person")]))
            calls.append(
                CallSpec(
                    stream,
                    prompt + Blocks(((start, 4),)),
                    tokens + draw(st.integers(1, 60)),
                    draw(st.integers(1, 40)),
                    pause_s,
                    kind,
                    after=after,
                    foreseen=draw(st.booleans()),
                )
            )
        found.append(ProgramSpec(f"p{number}", "graph", draw(st.sampled_from([0.0, 1.5])), tuple(calls), str(number)))
    return tuple(found)


def three_calls_at_once():
    calls = (CallSpec(str(number), Blocks(((100 * number, 4),)), 1, 1, after=()) for number in range(3))
    return (ProgramSpec("p0", "graph", 0.0, tuple(calls), "0"),)


class TestGraphs:
    MACHINE = replace(MACHINE, rows=3, step_tokens=32, step=StepCost(2**-6, 2**-9, 2**-20, 2**-20))

    def simulation(self, programs, name, concurrency):
        rule = policy(name)
        return simulation_of(
            *programs,
            machine=self.MACHINE,
            order=rule.order,
            retention=rule.retention,
            admission=rule.admission,
            clairvoyant=rule.clairvoyant,
            concurrency=concurrency,
        )

    @settings(max_examples=60, deadline=None)
    @given(programs_of_graphs(), st.sampled_from(sorted(PRESETS)), st.sampled_from([None, 2]))
    @example(three_calls_at_once(), "vllm", 2)
    def test_end_and_are_never_faster_than_alone_or_than_the_bound(self, programs, name, concurrency):
        outcome = self.simulation(programs, name, concurrency).run()
        assert sorted(record.id for record in outcome.programs) == [one.id for one in programs]
        assert outcome.decoded == sum(call.output_tokens for one in programs for call in one.calls)
        taken = [record.ended - record.began for record in outcome.programs]
        for seconds, record in zip(taken, outcome.programs, strict=True):
            assert 0 < record.alone_s <= seconds + 1e-9
        assert fluid_mean_s(Workload("w", SIZE, programs), self.MACHINE, concurrency) <= sum(taken) / len(taken) + 1e-9

    @settings(max_examples=20, deadline=None)
    @given(programs_of_graphs(), st.sampled_from(["vllm", "treadle"]))
    def test_are_simulated_the_same_again(self, programs, name):
        one, two = (self.simulation(programs, name, None) for _ in range(2))
        assert one.run().programs == two.run().programs
        assert events(one) == events(two)

    def test_that_are_chains_decide_as_programs_that_say_nothing_of_a_graph(self):
        plain = program(call(0), call(1, 3.0, stream="agent"), call(2, 5.0))
        told = replace(
            plain, calls=tuple(replace(one, after=((i - 1,) if i else ())) for i, one in enumerate(plain.calls))
        )
        told = replace(told, calls=(replace(told.calls[0], pause_kind="none"), *told.calls[1:]))
        one, two = simulation_of(plain), simulation_of(told)
        assert one.run().programs == two.run().programs
        assert events(one) == events(two)


def test_who_sees_the_future_knows_when_a_conversation_goes_on_while_another_one_runs():
    told = {}

    def look():
        """Asks for the end of the first call's pause, at every plan."""
        books = simulation.scheduler.books
        if "p/0" in books.leases:
            told[simulation.now] = books.foresight.returns(books.leases["p/0"])
        return 0.0

    calls = (call(0), call(1, 20.0, stream="agent"), call(2, 30.0, stream="agent"), call(3, 50.0))
    simulation = simulation_of(program(*calls), stopwatch=look, clairvoyant=True, leap=1)
    simulation.run()
    # The first call ends at 4 s, and those of the agent run from 24 s to 28 s and from 58 s to 62 s.
    assert told[4.0] == 4 + 20 + 30 + 50
    assert told[25.0] == 25 + 30 + 50
    assert told[28.0] == 28 + 30 + 50
    assert told[62.0] == 62 + 50
