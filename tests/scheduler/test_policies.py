"""What each policy decides, seen through a scheduler that is driven by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_engine import STEP_S, FakeEngine

from treadle.scheduler import (
    DUE_S,
    DeclareNode,
    EndProgram,
    OpenProgram,
    Resume,
    SchedulerConfig,
    SubmitCall,
    TokensOut,
    Wait,
)
from treadle.scheduler.config import Costs
from treadle.scheduler.policies.residency import STARVE_S


def engine(**settings_) -> FakeEngine:
    base = {
        "num_pages": 32,
        "vocab_size": 10_000,
        "max_context": 120,
        "page_size": 4,
        "num_slots": 8,
        "costs": Costs(0.1, 0.001, 0.001),
        "order": "fcfs",
        "retention": "lru",
        "admission": "greedy",
    }
    return FakeEngine(SchedulerConfig(**{**base, **settings_}))


def treadle(**settings_) -> FakeEngine:
    return engine(order="treadle", retention="treadle", admission="treadle", **settings_)


def prompt(first: int, length: int) -> tuple[int, ...]:
    return (first, *range(1000, 999 + length))


def submit(driver: FakeEngine, program: str, first: int, length: int, **more) -> None:
    driver.send(OpenProgram(program), SubmitCall(f"{program}/0", program, prompt(first, length), **more))


def started(driver: FakeEngine) -> list[str]:
    """Calls in the order in which they began to run."""
    return [line.subject for line in driver.scheduler.decisions if line.action == "admit"]


def history(driver: FakeEngine, call: str) -> tuple[int, ...]:
    return tuple(driver.tokens[call])


class TestOrder:
    def test_programs_of_higher_priority_go_first(self):
        driver = treadle(num_slots=1)
        for index, priority in enumerate([0, 5, 5]):
            driver.send(OpenProgram(f"p{index}", priority=priority))
            driver.send(SubmitCall(f"p{index}/0", f"p{index}", prompt(index, 8), max_tokens=2))
        driver.run()
        assert started(driver) == ["p1/0", "p2/0", "p0/0"]

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([5.0, 50.0, DUE_S, 3600.0])), min_size=2, max_size=6))
    def test_of_one_priority_goes_first_what_is_due_first(self, programs):
        driver = treadle(num_slots=1)
        due = {}
        for index, (priority, due_s) in enumerate(programs):
            driver.now += 1.0
            driver.send(OpenProgram(f"p{index}", priority=priority, due_s=due_s))
            driver.send(SubmitCall(f"p{index}/0", f"p{index}", prompt(index, 8), max_tokens=2))
            due[f"p{index}/0"] = (-priority, driver.now + due_s)
        driver.run()
        assert started(driver) == sorted(due, key=lambda call: due[call])

    @pytest.mark.parametrize("due_s", [float("nan"), float("inf")])
    def test_a_program_is_due_at_some_time(self, due_s):
        (event,) = treadle().send(OpenProgram("p", due_s=due_s))
        assert event.error == "bad_deadline"

    def test_of_one_program_the_call_goes_first_that_most_waits_for(self):
        driver = treadle(num_slots=1)
        driver.send(OpenProgram("p"))
        for node, inputs in [("side", ()), ("first", ()), ("second", ("first",)), ("end", ("second", "side"))]:
            driver.send(DeclareNode("p", node, "llm", inputs=inputs))
        for node in ("side", "first"):
            driver.send(SubmitCall(node, "p", prompt(len(node), 8), max_tokens=2, node_id=node))
        driver.run()
        assert started(driver) == ["first", "side"]

    def test_of_one_program_the_call_goes_first_that_begins_the_longest_path(self):
        """Three quick calls after one another are less than one with a slow tool behind it, once that is known."""
        firsts = []
        driver = treadle(num_slots=1)
        for run in range(10):
            program = f"p{run}"
            driver.send(OpenProgram(program, kind="k"))
            nodes = [("quick", "llm", ()), ("then", "llm", ("quick",)), ("last", "llm", ("then",)), ("slow", "llm", ())]
            for name, kind, inputs in [*nodes, ("tool", "tool", ("slow",))]:
                needed = tuple(f"{run} {each}" for each in inputs)
                driver.send(DeclareNode(program, f"{run} {name}", kind, name, inputs=needed))
            for name in ("quick", "slow"):
                node = f"{run} {name}"
                driver.send(SubmitCall(f"{program}/{name}", program, prompt(len(name), 8), max_tokens=2, node_id=node))
            driver.run()
            firsts.append(started(driver)[-2].partition("/")[2])
            driver.send(Wait(program, f"{run} tool"))
            driver.now += 30.0
            driver.send(Resume(program, f"{run} tool"), EndProgram(program))
        assert firsts == ["quick"] + ["slow"] * 9

    def test_least_attained_service_lets_the_new_program_pass(self):
        driver = engine(order="plas:0.05", num_slots=1)
        submit(driver, "old", 1, 8, max_tokens=20)
        driver.run()
        driver.send(SubmitCall("old/1", "old", prompt(1, 9), max_tokens=2))
        submit(driver, "new", 2, 8, max_tokens=2)
        driver.run()
        assert started(driver) == ["old/0", "new/0", "old/1"]

    def test_the_longest_path_counts_parallel_calls_once(self):
        driver = engine(order="atlas:0.2", num_slots=4)
        driver.send(OpenProgram("wide"))
        for index in range(4):
            driver.send(SubmitCall(f"wide/{index}", "wide", prompt(index, 8), max_tokens=10))
        driver.run()
        program = driver.scheduler._programs["wide"]
        assert program.path_s < program.service_s


class TestFanOut:
    @pytest.mark.parametrize("fork", [False, True])
    @pytest.mark.parametrize("same_program", [False, True])
    def test_what_calls_share_is_charged_once(self, same_program, fork):
        """Eight calls with a prompt of 60 pages in common and 4 of their own run at once in 100 pages."""
        driver = treadle(num_pages=100, max_context=380, num_slots=16)
        shared, most = prompt(1, 240), 0
        driver.send(OpenProgram("p"), *(OpenProgram(f"p{index}") for index in range(8)))
        for index in range(8):
            program = "p" if same_program else f"p{index}"
            own = (7, 8) if fork else (index, index + 1)
            parent = "call 0" if fork and index else None
            driver.send(SubmitCall(f"call {index}", program, shared + own, max_tokens=12, fork_of=parent))
        while driver.step():
            most = max(most, driver.scheduler.num_running)
        assert most == 8
        driver.scheduler.check_integrity()


class TestLeases:
    def test_a_turn_that_comes_back_finds_its_pages_under_pressure(self):
        """While the tool runs others press; with LRU they take the pages, with leases the youngest gives way."""
        found = {}
        for name, driver in {"lru": engine(), "treadle": treadle()}.items():
            submit(driver, "agent", 1, 60, max_tokens=4)
            driver.run()
            driver.send(DeclareNode("agent", "tool", "tool", "search", typical_s=0.1), Wait("agent", "tool"))
            for index in range(3):
                submit(driver, f"other{index}", 10 + index, 40, max_tokens=4)
                driver.run()
            driver.send(Resume("agent", "tool"))
            turn = (*prompt(1, 60), *history(driver, "agent/0"), 7, 8)
            driver.send(SubmitCall("agent/1", "agent", turn, max_tokens=4, extends="agent/0"))
            driver.run()
            found[name] = driver.finished["agent/1"].usage.cached
        assert found["treadle"] >= 56 > found["lru"]

    def test_who_returns_late_gives_way_before_who_returns_soon(self):
        driver = treadle(num_pages=32)
        for program, seconds in (("late", 5000.0), ("soon", 0.1)):
            submit(driver, program, len(program) + seconds > 100, 40, max_tokens=4)
            driver.run()
            driver.send(DeclareNode(program, "t", "tool", program, typical_s=seconds), Wait(program, "t"))
        submit(driver, "new", 77, 60, max_tokens=4)
        driver.run()
        left = {
            program: sum(
                len(node.pages)
                for node in driver.scheduler.memory.tree.nodes()
                if any(lease.program_id == program for lease in node.leases.values())
            )
            for program in ("late", "soon")
        }
        assert left["soon"] == 10 and left["late"] < 10

    def test_fall_with_their_program(self):
        driver = treadle()
        submit(driver, "agent", 1, 40, max_tokens=4)
        driver.run()
        driver.send(EndProgram("agent"))
        assert all(not node.leases for node in driver.scheduler.memory.tree.nodes())

    def test_of_one_program_are_bounded(self):
        driver = treadle(num_pages=400, max_context=400)
        driver.send(OpenProgram("many"))
        for index in range(300):
            driver.send(SubmitCall(f"c{index}", "many", prompt(index + 5000, 4), max_tokens=1))
            driver.run()
        assert len(driver.scheduler._programs["many"].leases) == 256

    def test_of_waiting_calls_never_fall(self):
        driver = treadle(num_pages=400, max_context=400, num_slots=2)
        driver.send(OpenProgram("wide"))
        for index in range(300):
            driver.send(SubmitCall(f"c{index}", "wide", prompt(index + 5000, 4), max_tokens=2))
        driver.run()
        assert len(driver.finished) == 300

    def test_of_another_conversation_are_left_alone_by_a_call_of_a_declared_graph(self):
        driver = treadle(num_pages=64)
        driver.send(OpenProgram("agent"))
        for node in ("parent", "child"):
            driver.send(DeclareNode("agent", node, "llm"))
        driver.send(SubmitCall("parent", "agent", tuple(range(40)), max_tokens=2, node_id="parent"))
        driver.run()
        driver.send(SubmitCall("child", "agent", (*range(20), 77, 78), max_tokens=2, node_id="child"))
        driver.run()
        assert "parent" in driver.scheduler._programs["agent"].leases

    def test_beyond_a_tenants_share_go_first(self):
        driver = treadle(num_pages=32, tenant_share=0.4)
        for index in range(2):
            driver.send(OpenProgram(f"greedy{index}", tenant="greedy"))
            driver.send(SubmitCall(f"greedy{index}/0", f"greedy{index}", prompt(index, 40), max_tokens=1))
            driver.run()
        driver.send(OpenProgram("modest", tenant="modest"))
        driver.send(SubmitCall("modest/0", "modest", prompt(9, 40), max_tokens=1))
        driver.run()
        submit(driver, "new", 30, 40, max_tokens=1)
        driver.run()
        modest = [
            n for n in driver.scheduler.memory.tree.nodes() for lease in n.leases.values() if lease.tenant == "modest"
        ]
        assert sum(len(node.pages) for node in modest) == 10


class TestHostTier:
    def test_a_demoted_turn_is_loaded_and_not_computed_again(self):
        driver = treadle(num_pages=32, num_host_pages=64)
        submit(driver, "agent", 1, 60, max_tokens=4)
        driver.run()
        for index in range(3):
            submit(driver, f"other{index}", 10 + index, 100, max_tokens=4)
            driver.run()
        turn = (*prompt(1, 60), *history(driver, "agent/0"), 7, 8)
        driver.send(SubmitCall("agent/1", "agent", turn, max_tokens=4))
        driver.run()
        assert driver.scheduler.memory.num_loaded > 0
        assert driver.finished["agent/1"].usage.prefilled <= 6

    def test_a_full_host_is_a_miss_and_never_a_wait(self):
        driver = treadle(num_pages=32, num_host_pages=2)
        for index in range(6):
            submit(driver, f"p{index}", index, 100, max_tokens=4)
        driver.run()
        assert len(driver.finished) == 6


class TestSharing:
    def test_siblings_wait_for_the_prefix_that_one_of_them_computes(self):
        driver = treadle(num_pages=64, max_step_tokens=16)
        driver.send(OpenProgram("fan"))
        for index in range(4):
            tokens = (*range(100, 140), 200 + index)
            driver.send(SubmitCall(f"b{index}", "fan", tokens, max_tokens=2))
        driver.run()
        assert sum(driver.finished[f"b{index}"].usage.prefilled for index in range(4)) == 41 + 3


POLICIES = [
    ("fcfs", "lru", "greedy"),
    ("continuum", "continuum", "greedy"),
    ("program-fcfs", "lru", "pause-resume"),
    ("program-fcfs", "lru", "aimd"),
    ("treadle", "treadle", "treadle"),
]


class TestProgress:
    @pytest.mark.parametrize(("order", "retention", "admission"), POLICIES)
    def test_a_pool_that_holds_one_call_finishes_them_all(self, order, retention, admission):
        driver = engine(num_pages=8, order=order, retention=retention, admission=admission)
        for index in range(5):
            submit(driver, f"p{index}", index, 20, max_tokens=10)
        driver.run()
        assert {end.reason for end in driver.finished.values()} == {"length"}

    @settings(max_examples=30, deadline=None)
    @given(st.integers(4, 9), st.integers(1, 6))
    def test_nobody_starves(self, length, width):
        """A program that always has work, and is always in memory, does not keep another out for ever.

        The bound: after `STARVE_S` of waiting a call gives way to older programs only.
        """
        driver = treadle(num_pages=length * 4, num_slots=8)
        for index in range(width):
            submit(driver, f"busy{index}", index, 4 * length * 4 // (width + 1), max_tokens=1)
        submit(driver, "old", 50, 4 * length * 3, max_tokens=1)
        begun = driver.now
        turn = 0
        while "old/0" not in driver.finished:
            driver.step()
            driver.now += STARVE_S / 50
            turn += 1
            submit(driver, f"young{turn}", 60 + turn, 4 * length * 2, max_tokens=1)
            assert driver.now - begun < 3 * STARVE_S, "starves"

    def test_a_clock_that_jumps_changes_nothing_but_time(self):
        driver = treadle()
        submit(driver, "agent", 1, 40, max_tokens=4)
        driver.run()
        driver.send(DeclareNode("agent", "tool", "tool", "t"), Wait("agent", "tool"))
        for index, jump in enumerate((1e6, -2e6, 0.0)):
            driver.now += jump
            submit(driver, f"p{index}", 5 + index, 60, max_tokens=4)
            driver.run()
        assert all(end.reason == "length" for end in driver.finished.values())

    def test_two_calls_of_one_program_at_once_and_an_end_that_comes_twice(self):
        driver = treadle()
        driver.send(OpenProgram("p"))
        for index in range(2):
            driver.send(SubmitCall(f"c{index}", "p", prompt(1, 30), max_tokens=3))
        driver.run()
        assert len(driver.finished) == 2
        driver.send(EndProgram("p"))
        (refused,) = driver.send(EndProgram("p"))
        assert refused.error == "unknown_program"

    def test_ten_thousand_programs_that_disappear_leave_bounded_tables(self):
        driver = treadle(max_programs=100)
        refusals = 0
        for index in range(10_000):
            refusals += len(driver.send(OpenProgram(f"p{index}")))
        assert refusals == 9_900
        assert len(driver.scheduler._programs) == 100

    def test_a_tool_that_lies_about_its_time_costs_only_its_own_program(self):
        driver = treadle(num_pages=32)
        submit(driver, "liar", 1, 60, max_tokens=2)
        driver.run()
        driver.send(DeclareNode("liar", "t", "tool", "lie", typical_s=0.001), Wait("liar", "t"))
        driver.now += 100_000
        submit(driver, "honest", 2, 100, max_tokens=2)
        driver.run()
        assert driver.finished["honest/0"].reason == "length"


def test_tokens_come_in_groups_only_when_repeats_are_asked_for():
    driver = treadle()
    submit(driver, "p", 1, 8, max_tokens=20)
    driver.run()
    assert all(len(event.token_ids) == 1 for event in driver.events if isinstance(event, TokensOut))
    assert driver.now >= 20 * STEP_S


class TestNames:
    @pytest.mark.parametrize(
        ("setting", "name", "message"),
        [
            ("order", "lifo", "unknown order policy 'lifo'; choose one of"),
            ("retention", "fixed:soon", "a number of seconds above 0"),
            ("retention", "fixed:-1", "a number of seconds above 0"),
            ("order", "fcfs:3", "'fcfs' takes no number"),
            ("admission", "greedy:1", "'greedy' takes no number"),
        ],
    )
    def test_that_make_no_sense_are_refused(self, setting, name, message):
        with pytest.raises(ValueError, match=message):
            engine(**{setting: name})

    def test_may_carry_seconds(self):
        submitted = engine(order="plas:0.5", retention="fixed:30")
        submit(submitted, "p", 1, 8, max_tokens=2)
        submitted.run()
        assert submitted.finished["p/0"].reason == "length"
