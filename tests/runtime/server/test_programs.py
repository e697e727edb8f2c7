"""Live programs on a real engine: found by name or by what was said, told to the scheduler, ended, bounded."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc

import pytest
from support.live_programs import ANY, named, result, running, said

from treadle.runtime.server import roll
from treadle.runtime.server.errors import ApiError
from treadle.runtime.server.identity import Identity
from treadle.runtime.server.tenants import EVERYBODY, Tenant
from treadle.scheduler import EndProgram, OpenProgram

ALICE, BOB = Tenant("alice"), Tenant("bob")


@pytest.fixture
async def bench():
    async with running() as bench:
        yield bench


class TestWhose:
    async def test_a_name_is_one_program(self, bench):
        first, _ = await bench.turn([said("a")], identity=named("n"))
        second, _ = await bench.turn([said("b")], identity=named("n"))
        assert first is second and first.public_id == "n"

    async def test_of_two_tenants_it_is_two(self, bench):
        first, _ = await bench.turn([said("a")], identity=named("n"), tenant=ALICE)
        second, _ = await bench.turn([said("a")], identity=named("n"), tenant=BOB)
        assert first is not second and first.id != second.id
        await bench.settle()
        tenants = {program.id: program.tenant for program in bench.scheduler._programs.values()}
        assert tenants == {first.id: "alice", second.id: "bob"}

    async def test_a_conversation_that_goes_on_belongs_to_its_program(self, bench):
        first, answer = await bench.turn([said("a")])
        second, _ = await bench.turn([said("a"), answer, said("b")])
        assert first is second and first.public_id.startswith("prog_")

    async def test_a_conversation_that_only_begins_alike_does_not(self, bench):
        first, _ = await bench.turn([said("a")])
        second, _ = await bench.turn([said("a")])
        third, _ = await bench.turn([said("a"), {"role": "assistant", "content": "I never said that"}, said("b")])
        assert len({first.id, second.id, third.id}) == 3

    async def test_another_tenants_conversation_is_not_continued(self, bench):
        first, answer = await bench.turn([said("a")], tenant=ALICE)
        second, _ = await bench.turn([said("a"), answer, said("b")], tenant=BOB)
        assert first is not second

    async def test_a_trace_gives_way_to_the_conversation(self, bench):
        first, answer = await bench.turn([said("a")], identity=named("trace 1", is_weak=True))
        second, _ = await bench.turn([said("a"), answer, said("b")], identity=named("trace 2", is_weak=True))
        third, _ = await bench.turn([said("c")], identity=named("trace 2", is_weak=True))
        assert first is second and third.public_id == "trace 2"

    async def test_a_trace_gives_way_even_if_it_names_another_program(self, bench):
        first, answer = await bench.turn([said("a")])
        other, _ = await bench.turn([said("b")], identity=named("trace", is_weak=True))
        assert (await bench.turn([said("a"), answer, said("c")], identity=named("trace", is_weak=True)))[0] is first
        assert (await bench.turn([said("d")], identity=named("trace", is_weak=True)))[0] is other

    async def test_urgency_before_all_others_needs_the_admins_key(self, bench):
        urgent = Identity(priority=5, due_s=0.1)
        program, _ = await bench.turn([said("a")], tenant=ALICE, identity=urgent)
        assert (program.priority, program.due_s) == (0, 60.0)
        program, _ = await bench.turn([said("a")], identity=urgent)
        assert (program.priority, program.due_s) == (5, 0.1)


class TestGraph:
    async def test_tools_are_inferred_from_the_turn_that_calls_and_the_request_that_answers(self, bench):
        program, call = await bench.turn([said("a")], tool_calls=[("c1", "search"), ("c2", "fetch")])
        assert program.state == "tool" and set(program.tools) == {"c1", "c2"}
        await bench.settle()
        assert bench.scheduler._programs[program.id].tool == "fetch"
        await bench.turn([said("a"), call, result("c1"), result("c2")])
        assert program.state == "person" and not program.tools
        assert await bench.nodes(program) == {
            "llm-1": ("llm", "turn", (), None),
            "tool-2": ("tool", "search", ("llm-1",), None),
            "tool-3": ("tool", "fetch", ("llm-1",), None),
            "llm-4": ("llm", "turn", ("tool-2", "tool-3"), "llm-1"),
            "person-5": ("person", "person", ("llm-4",), None),
        }
        account = await bench.programs.end(program)
        assert account.tools == 2 and account.tool_wait_s > 0
        assert [step.name for step in account.critical_path] in (["turn", name, "turn"] for name in ("search", "fetch"))

    async def test_a_tool_has_ended_when_its_id_comes_back_whatever_else_is_told(self, bench):
        program, call = await bench.turn(
            [said("a")], identity=named("n"), tool_calls=[("c1", "search"), ("c2", "fetch")]
        )
        await bench.turn([said("in short: a"), call, result("c1")], identity=named("n"))
        assert set(program.tools) == {"c2"} and program.nodes["tool-2"].state == "done"
        assert program.nodes["llm-4"].inputs == ("tool-2",)

    async def test_nobody_is_waited_for_after_a_prompt(self, bench):
        program, _ = await bench.turn(None, identity=named("n"))
        assert [node.kind for node in program.nodes.values()] == ["llm"] and not program.ends

    async def test_the_next_prompt_extends_the_last_one_exactly(self, bench):
        program, answer = await bench.turn([said("a")])
        ids = bench.programs.recorded.get(program.id, answer)
        before, _ = bench.last
        assert before[-len(ids) :] == ids
        await bench.turn([said("a"), answer, said("b")], prompt=(*before, 5, 6, 7))
        # All was computed but the token that was sampled last.
        assert bench.last[1].usage.cached == len(before) - 1

    async def test_branches_of_a_conversation_are_told_apart(self, bench):
        program, answer = await bench.turn([said("a")], identity=named("n"))
        await bench.turn([said("a"), answer, said("b")], identity=named("n"))
        await bench.turn([said("a"), answer, said("c")], identity=named("n"))
        await bench.turn([said("other")], identity=named("n"))
        extends = [node.extends for node in program.nodes.values() if node.kind == "llm"]
        assert extends == [None, "llm-1", "llm-1", None]

    async def test_of_several_answers_the_one_goes_on_that_comes_back(self, bench):
        program = await bench.programs.enter(EVERYBODY, ANY, [said("a")])
        node = bench.programs.begin_turn(program, ANY, [said("a")])
        answers = []
        for index in range(2):
            call = {"id": f"c{index}", "function": {"name": "search", "arguments": "{}"}}
            answers.append({"role": "assistant", "content": f"try {index}", "tool_calls": [call]})
            bench.programs.end_turn(
                node,
                call_id=f"call {index}",
                message=answers[-1],
                token_ids=[index],
                finish_reason="tool_calls",
            )
        bench.programs.leave_turn(node)
        node = bench.programs.begin_turn(program, ANY, [said("a"), answers[1], result("c1")])
        assert node.extends == "call 1" and program.nodes[node.node_id].inputs == ("tool-3",)
        assert not program.tools
        bench.programs.leave_turn(node)

    async def test_a_step_names_the_turn(self, bench):
        program, _ = await bench.turn([said("a")], identity=named("n", step="plan"))
        await bench.turn([said("b")], identity=named("n"))
        assert [node.name for node in program.nodes.values() if node.kind == "llm"] == ["plan", "plan"]

    async def test_a_program_without_room_goes_on_without_nodes(self, bench, monkeypatch):
        monkeypatch.setattr(roll, "MAX_NODES", 3)
        program, answer = await bench.turn([said("a")], tool_calls=[("c1", "t"), ("c2", "t"), ("c3", "t")])
        assert len(program.nodes) == 3
        same, _ = await bench.turn([said("a"), answer, *map(result, ("c1", "c2", "c3"))])
        assert same is program and len(program.nodes) == 3 and not program.tools


class TestEnd:
    async def test_a_program_that_ended_is_not_found(self, bench):
        program, answer = await bench.turn([said("a")], identity=named("n"))
        account = await bench.programs.end(program)
        assert account.calls == 1 and account.usage.decoded == 6
        assert bench.programs.find(EVERYBODY, "n") is None
        assert bench.programs.find_ended(EVERYBODY, "n") is program
        again, _ = await bench.turn([said("a"), answer, said("b")])
        assert again is not program
        assert await bench.programs.end(program) is account, "ending twice changes nothing"

    async def test_who_asks_while_it_ends_waits_for_the_account(self, bench):
        program, _ = await bench.turn([said("a")])
        bench.programs.end_soon(program, "for some reason")
        assert program.account is None
        one, other = await asyncio.gather(bench.programs.end(program), bench.programs.end(program))
        assert one is other is program.account is not None
        assert bench.kinds().count("program.ended") == 1

    async def test_a_program_ends_although_nobody_waits_for_it(self, bench):
        program, _ = await bench.turn([said("a")])
        ending = asyncio.create_task(bench.programs.end(program))
        await asyncio.sleep(0)
        ending.cancel()
        assert (await bench.programs.end(program)).calls == 1

    async def test_a_name_can_be_used_again(self, bench):
        first, _ = await bench.turn([said("a")], identity=named("n"))
        ending = asyncio.create_task(bench.programs.end(first))
        await asyncio.sleep(0)
        second, _ = await bench.turn([said("a")], identity=named("n"))
        await ending
        assert second is not first and bench.programs.find(EVERYBODY, "n") is second
        assert bench.programs.find_ended(EVERYBODY, "n") is None

    async def test_a_request_said_to_be_the_last_ends_the_program(self, bench):
        program, _ = await bench.turn([said("a")], identity=named("n"))
        await bench.turn([said("b")], identity=named("n", final=True))
        assert program.state == "ended"

    async def test_the_last_request_ends_the_program_when_those_have_ended_that_run_beside_it(self, bench):
        program = await bench.programs.enter(EVERYBODY, named("n"), [said("a")])
        other = bench.programs.begin_turn(program, ANY, [said("a")])
        await bench.turn([said("b")], identity=named("n", final=True))
        assert program.state == "running"
        bench.programs.leave_turn(other)
        assert program.state == "ended"

    async def test_a_turn_of_a_program_that_ended_meanwhile_is_refused(self, bench):
        program = await bench.programs.enter(EVERYBODY, ANY, [said("a")])
        await bench.programs.end(program)
        with pytest.raises(ApiError) as raised:
            bench.programs.begin_turn(program, ANY, [said("a")])
        assert raised.value.status == 409

    async def test_idle_ones_end_by_themselves(self):
        async with running(idle_s=0.05) as bench:
            idle, _ = await bench.turn([said("a")])
            active = await bench.programs.enter(EVERYBODY, ANY, [said("b")])
            node = bench.programs.begin_turn(active, ANY, [said("b")])
            expiry = asyncio.create_task(bench.programs.expire())
            async with asyncio.timeout(5):
                while idle.account is None:
                    await asyncio.sleep(0.01)
            assert active.ended is None and "idle" in idle.end_reason
            bench.programs.leave_turn(node, failed=True)
            async with asyncio.timeout(5):
                while active.account is None:
                    await asyncio.sleep(0.01)
            expiry.cancel()
            await bench.settle()
            assert not bench.scheduler._programs

    @pytest.mark.parametrize(("keep_s", "left"), [(0.0, False), (30.0, False), (90.0, True)])
    async def test_what_a_client_tells_keeps_a_program_for_as_long_as_was_granted(self, keep_s, left):
        now = [0.0]
        async with running(idle_s=20.0, clock=lambda: now[0]) as bench:
            program, _ = await bench.turn([said("a")])
            now[0] = 15.0
            bench.programs.heard(program, keep_s)
            now[0] = 30.0
            bench.programs.expire_now()
            assert program.ended is None, "it was heard of 15 s ago"
            now[0] = 60.0
            bench.programs.expire_now()
            assert (program.ended is None) is left

    async def test_an_engine_that_is_gone_leaves_no_account(self, bench):
        program, _ = await bench.turn([said("a")])
        await bench.session.__aexit__(None, None, None)
        assert await bench.programs.end(program) is None


class TestBounds:
    async def test_the_longest_idle_of_the_same_tenant_makes_room(self, bench):
        tenant = Tenant("alice", max_programs=2)
        first, _ = await bench.turn([said("a")], tenant=tenant)
        waits, _ = await bench.turn([said("b")], tenant=tenant, tool_calls=[("c1", "t")])
        third, _ = await bench.turn([said("c")], tenant=tenant)
        fourth, _ = await bench.turn([said("d")], tenant=tenant)
        assert [p.state == "ended" for p in (first, waits, third, fourth)] == [True, False, True, False]

    async def test_who_makes_room_ends_in_the_scheduler_before_the_next_one_begins(self, bench, monkeypatch):
        sent, send = [], bench.session.send
        monkeypatch.setattr(bench.session, "send", lambda *commands: (sent.extend(commands), send(*commands)))
        for name in ("one", "two"):
            await bench.programs.enter(Tenant("alice", max_programs=1), named(name))
        assert [type(command) for command in sent] == [OpenProgram, EndProgram, OpenProgram]

    async def test_a_tenant_whose_programs_all_run_is_refused(self, bench):
        tenant = Tenant("alice", max_programs=1)
        program = await bench.programs.enter(tenant, ANY, [said("a")])
        bench.programs.begin_turn(program, ANY, [said("a")])
        with pytest.raises(ApiError) as raised:
            await bench.programs.enter(tenant, ANY, [said("b")])
        assert raised.value.status == 429 and raised.value.retry_after
        assert await bench.programs.enter(BOB, ANY, [said("b")])

    async def test_a_flood_of_one_tenant_costs_the_others_nothing(self):
        async with running(max_programs=8) as bench:
            modest, _ = await bench.turn([said("a")], tenant=BOB)
            for index in range(40):
                await bench.programs.enter(ALICE, named(f"p{index}"))
            assert modest.ended is None and len(bench.programs) == 8

    async def test_ten_thousand_ids_do_not_grow_memory(self):
        async with running(max_programs=64) as bench:

            async def flood(name, count):
                for index in range(count):
                    messages = [said(f"{name} {index}")]
                    program = await bench.programs.enter(ALICE, named(f"{name}-{index}"), messages)
                    node = bench.programs.begin_turn(program, ANY, messages)
                    message = {"role": "assistant", "content": "fine"}
                    bench.programs.end_turn(
                        node, call_id="c", message=message, token_ids=range(100), finish_reason="stop"
                    )
                    bench.programs.leave_turn(node)
                    if index % 100 == 0:
                        await bench.settle()
                bench.told.clear()
                await bench.settle()
                gc.collect()
                return tracemalloc.get_traced_memory()[0]

            tracemalloc.start()
            try:
                warm = await flood("warm", 2000)
                grown = await flood("more", 8000) - warm
            finally:
                tracemalloc.stop()
            assert grown < 256 * 1024, f"{grown} bytes"
            assert len(bench.programs) == len(bench.scheduler._programs) == 64


async def test_watchers_are_told_what_happens(bench):
    program, call = await bench.turn([said("a")], tool_calls=[("c1", "search")])
    await bench.turn([said("a"), call, result("c1")])
    await bench.programs.end(program)
    assert bench.kinds() == [
        "program.opened",
        "turn.started",
        "tool.started",
        "turn.finished",
        "tool.ended",
        "turn.started",
        "turn.finished",
        "program.ended",
    ]
    assert bench.told[-1][2]["account"]["calls"] == 2


async def test_states_are_counted(bench):
    await bench.turn([said("a")], tool_calls=[("c1", "search")])
    await bench.turn([said("b")])
    program = await bench.programs.enter(EVERYBODY, ANY, [said("c")])
    assert bench.programs.states() == {"running": 0, "tool": 1, "person": 1, "idle": 1}
    assert program.to_json(bench.programs.now)["state"] == "idle"
