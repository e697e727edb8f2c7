"""Programs: scopes, what they inherit, how they end."""

import asyncio
import time

import pytest
from support.fake_backend import FakeBackend, Reply, eventually
from support.flows import double, review, write

from treadle.dsl import current_program, gather, llm, program, prompt, use_backend
from treadle.dsl.errors import (
    DeadlineExceeded,
    DSLError,
    ForeignVarError,
    NoBackendError,
    NodeCancelled,
    ProgramCancelled,
    ProgramEndedError,
)


async def hang(text):
    await asyncio.sleep(60)


async def test_a_scope_opens_and_closes_a_program(backend):
    async with program("report") as p:
        assert current_program() is p and backend.events == ["open report"]
        await write("x")
    assert current_program() is None and p.ended
    assert backend.events == ["open report", "close report"]
    assert p.account == {"calls": 1}


async def test_leaving_a_scope_cancels_what_still_runs_and_waits_for_its_end(backend):
    backend.model = hang
    async with program("p"):
        draft = write("x")
        verdict = review(draft)
        await eventually(lambda: backend.prompts)
    assert backend.num_running == 0
    assert draft.node.state == verdict.node.state == "cancelled"
    with pytest.raises(ProgramCancelled, match="ended before"):
        await verdict


async def test_an_error_leaves_the_scope_unchanged_and_is_told_to_the_backend(backend):
    error = RuntimeError("mine")
    with pytest.raises(RuntimeError, match="mine"):
        async with program("p"):
            raise error
    assert backend.errors == {"p": error}


async def test_cancelling_the_task_ends_the_program(backend):
    backend.model = hang

    async def run():
        async with program("p"):
            await write("x")

    task = asyncio.ensure_future(run())
    await eventually(lambda: backend.prompts)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert backend.num_running == 0 and backend.events[-1] == "close p"


async def test_a_deadline_cancels_whatever_the_scope_is_doing(backend):
    backend.model = hang
    drafts = []

    @program("p", deadline="50ms")
    async def sleeps():
        drafts.append(write("x"))
        await asyncio.sleep(60)

    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="'p' did not end before its deadline"):
        await sleeps()
    assert time.monotonic() - started < 5
    assert backend.num_running == 0
    with pytest.raises(DeadlineExceeded):
        await drafts[0]


async def test_a_program_inside_inherits_and_can_only_tighten():
    options = {"budget_tokens": 100, "tenant": "t", "priority": 3, "objective": "throughput"}
    async with program("outer", deadline=10, **options) as outer:
        async with program("inner", deadline=60, budget_tokens=500) as inner:
            assert inner.parent is outer and inner.deadline == outer.deadline and inner.budget_tokens == 100
            assert (inner.tenant, inner.priority, inner.objective) == ("t", 3, "throughput")
        async with program("inner", deadline=1, budget_tokens=5, priority=1) as inner:
            assert inner.deadline < outer.deadline and inner.budget_tokens == 5 and inner.priority == 1
        with pytest.raises(DSLError, match="for tenant 'u'"):
            async with program("inner", tenant="u"):
                pass


async def test_the_deadline_of_the_outer_program_ends_the_inner_one(backend):
    backend.model = hang
    with pytest.raises(DeadlineExceeded, match="'outer'"):
        async with program("outer", deadline=0.05), program("inner", deadline=60):
            await write("x")
    assert backend.events == ["open outer", "open inner", "close inner", "close outer"]


async def test_a_program_that_is_left_ends_the_programs_opened_inside_it_elsewhere(backend):
    backend.model = hang

    async def inside():
        async with program("inner"):
            await write("x")

    async with program("outer"):
        task = asyncio.ensure_future(inside())
        await eventually(lambda: backend.prompts)
    assert backend.num_running == 0
    with pytest.raises(ProgramCancelled):
        await task


async def test_a_decorated_function_is_a_program_for_each_call(backend):
    seen = []

    @program(deadline=5)
    async def report(topic: str, *, style: str) -> str:
        seen.append(current_program())
        return await write(topic, style)

    assert await report("a", style="b") == "write a b"
    assert await report("c", style="d") == "write c d"
    assert [p.name for p in seen] == ["report", "report"] and seen[0].id != seen[1].id
    assert seen[1].result == "write c d"
    assert report.__name__ == "report"


async def test_a_call_outside_of_a_scope_is_a_program_of_its_own(backend):
    draft = write("x")
    assert await draft == "write x plain"
    await eventually(lambda: backend.events == ["open write", "close write"])
    assert draft.program.implicit and draft.program.account == {"calls": 1}


async def test_calls_outside_of_a_scope_that_take_each_others_values_are_one_program(backend):
    verdict = write(write("x"))
    assert await verdict == "write write x plain plain"
    await eventually(lambda: backend.events == ["open write", "close write"])
    assert await write(verdict) == "write write write x plain plain plain"
    assert await gather(*write.map(["a", "b"])) == ("write a plain", "write b plain")


async def test_two_programs_without_a_scope_cannot_be_joined():
    first, second = write("x"), write("y")
    with pytest.raises(ForeignVarError, match="inside one `async with program"):
        gather(first, second)


async def test_a_call_after_the_scope_was_left_is_an_error():
    async def late():
        await asyncio.sleep(0.01)
        return write("x")

    async with program("p"):
        task = asyncio.ensure_future(late())
    with pytest.raises(ProgramEndedError, match="after its scope was left"):
        await task


async def test_a_scope_is_used_once():
    scope = program("p")
    async with scope:
        pass
    with pytest.raises(DSLError, match="one scope"):
        async with scope:
            pass


async def test_without_a_backend_the_error_says_how_to_open_one():
    with use_backend(None), pytest.raises(NoBackendError, match=r'async with treadle\.runtime\.local\("smollm2"\)'):
        write("x")


async def test_a_backend_that_cannot_open_a_program_fails_its_calls():
    class Full(FakeBackend):
        async def open_program(self, program):
            raise RuntimeError("full")

    with use_backend(Full()):
        with pytest.raises(RuntimeError, match="full"):
            await write("x")
        with pytest.raises(RuntimeError, match="full"):
            async with program("p"):
                pass


async def test_a_cancelled_variable_fails_its_dependents(backend):
    backend.model = hang
    async with program("p"):
        draft = write("x")
        verdict = review(draft)
        await eventually(lambda: backend.prompts)
        draft.cancel()
        with pytest.raises(NodeCancelled, match="was cancelled"):
            await verdict
        assert draft.node.state == verdict.node.state == "cancelled"
        await eventually(lambda: backend.num_running == 0)


async def test_calls_made_by_a_body_or_a_tool_belong_to_the_program(backend):
    backend.model = lambda text: Reply("done")

    @llm
    async def relay(text: str) -> str:
        note = await write(text)
        return prompt(note)

    async with program("p") as p:
        await relay("x")
        await double(2)
        assert [node.name for node in p.graph.nodes()] == ["relay", "write", "double"]
