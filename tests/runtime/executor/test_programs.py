"""Programs on the engine: same results as one call after the other, the graph told as it is, nothing left behind."""

from __future__ import annotations

import asyncio
import threading
from typing import Annotated, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from treadle.dsl import In, gather, llm, program, prompt
from treadle.dsl.errors import BudgetExceeded, DSLError, NodeFailed, OutputError


class Point(BaseModel):
    """Without free text in it, in which a random model would wander until its tokens are used up."""

    x: Annotated[int, Field(ge=0, le=99)]
    side: Literal["left", "right"]


@llm(max_tokens=12)
async def write(topic: In[str], other: In[str] = "") -> str:
    return prompt(f"Write about {topic} and {other}.")


@llm(max_tokens=80)
async def locate(text: In[str]) -> Point:
    return prompt(f"Where is {text}?")


def scheduler_of(runtime):
    return runtime._engine._engine.scheduler


async def at_rest(runtime):
    """Waits until the engine has nothing, and asserts that nothing leaked."""
    scheduler = scheduler_of(runtime)
    for _ in range(500):
        if not scheduler._calls and not scheduler.num_in_flight:
            break
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.01)
    assert not scheduler._calls
    scheduler.check_integrity()
    assert scheduler.memory.num_available == scheduler.memory.pool.num_pages
    assert runtime._executor._tasks == {}


async def test_a_variable_is_an_edge_and_its_text_is_in_the_prompt(fast_runtime):
    async with fast_runtime() as runtime, program("chain") as scope:
        first = write("looms")
        second = write(first, "weft")
        assert isinstance(await second, str)
        assert second.node.inputs == (first.node,)
        told = scheduler_of(runtime).graph(scope.id)
        assert [(node.name, node.inputs) for node in told.nodes()] == [("write", ()), ("write", (first.node.id,))]


async def test_the_known_part_of_a_prompt_is_computed_before_the_rest_is_there(fast_runtime):
    async with fast_runtime() as runtime:
        async with program("early"):
            first = write("looms")
            second = write(first)
            await second
        decisions = list(scheduler_of(runtime).decisions)
    second_id = f"{second.program.id}/{second.node.id}/0"
    first_id = f"{first.program.id}/{first.node.id}/0"
    admitted = next(i for i, d in enumerate(decisions) if d.subject == second_id and d.action == "admit")
    finished = next(i for i, d in enumerate(decisions) if d.subject == first_id and d.action == "finish")
    assert admitted < finished


async def test_programs_in_a_hurry_go_before_those_that_have_time(fast_runtime):
    async def run(name, **options):
        async with program(name, **options):
            await write(name)

    options = {"waits": {"objective": "throughput"}, "plain": {}, "due": {"deadline": 60}}
    options = {name: {"priority": 0, **each} for name, each in options.items()}
    async with fast_runtime(num_slots=1) as runtime:
        async with program("first", priority=1):
            busy = write("others wait for it")
            async with asyncio.TaskGroup() as group:
                for name, each in options.items():
                    group.create_task(run(name, **each))
            await busy
        admitted = [d.subject for d in scheduler_of(runtime).decisions if d.action == "admit"]
    assert [call.rpartition("-")[0] for call in admitted] == ["first", "due", "plain", "waits"]


async def test_typed_output_is_a_value_of_its_type(fast_runtime):
    async with fast_runtime(), program("typed"):
        for seed in range(5):
            point = await locate.using(temperature=1.5, seed=seed, max_tokens=400)("here")
            assert isinstance(point, Point)


async def test_output_that_is_cut_off_says_what_to_change(fast_runtime):
    async with fast_runtime(), program("cut"):
        with pytest.raises(OutputError, match="give a larger max_tokens"):
            await locate.using(max_tokens=3)("here")


async def test_samples_compute_the_prompt_once(fast_runtime):
    async with fast_runtime() as runtime:
        async with program("samples") as scope:
            texts = await write.n(4)("looms", "a long enough prompt to see that it is shared between the samples")
        assert len(set(texts)) > 1
        usage = scope.account.usage
    assert usage.prefilled < 2 * usage.cached / 3, usage
    assert scope.account.calls == 4
    assert runtime.programs[0] is scope


async def test_samples_of_an_open_prompt_share_it_too(fast_runtime):
    async with fast_runtime():
        async with program("samples") as scope:
            await write.n(3)(write("looms"), "a long enough prompt to see that it is shared between the samples")
        usage = scope.account.usage
    assert usage.cached > 2 * 20


async def test_a_call_that_fails_fails_what_depends_on_it_and_nothing_else(fast_runtime):
    async with fast_runtime() as runtime:
        async with program("failing"):
            bad = locate.using(max_tokens=2)("nowhere")
            after = write(bad)
            last = write(after)
            beside = write("beside")
            with pytest.raises(NodeFailed) as failure:
                await last
            assert [step.name for step in failure.value.path] == ["write", "write", "locate"]
            assert isinstance(failure.value.cause, OutputError)
            assert await beside
        await at_rest(runtime)


async def test_a_body_that_raises_fails_its_call(fast_runtime):
    @llm
    async def broken(topic: str) -> str:
        raise LookupError(f"no {topic}")

    async with fast_runtime(), program("broken"):
        with pytest.raises(LookupError, match="no such"):
            await broken("such")


async def test_a_body_that_gives_the_value_skips_the_model(fast_runtime):
    @llm
    async def known(topic: str) -> str:
        return f"all about {topic}"

    async with fast_runtime(), program("known") as scope:
        assert await known("looms") == "all about looms"
        assert isinstance(await write(known("looms")), str)
    assert scope.account.calls == 1


async def test_account_and_critical_path(fast_runtime):
    async with fast_runtime(), program("accounted") as scope:
        one, two = write("one"), write("two")
        await gather(write(one), write(two))
    account = scope.account
    assert account.calls == 4
    assert account.usage.decoded == sum(len(n.output.token_ids) for n in scope.graph.nodes() if n.kind == "llm")
    assert [step.name for step in account.critical_path][:2] == ["write", "write"]
    assert sum(step.seconds for step in account.critical_path) <= account.duration_s + 0.01
    assert account.to_json()["decoded"] == account.usage.decoded


async def test_leaving_the_runtime_leaves_no_thread(fast_runtime):
    async with fast_runtime() as runtime:
        await write("looms")
        await at_rest(runtime)
    await asyncio.sleep(0.05)
    assert not [t for t in threading.enumerate() if t.name.startswith("treadle")]


async def test_a_budget_of_tokens_is_kept(fast_runtime):
    async with fast_runtime():
        async with program("frugal", budget_tokens=80) as scope:
            results = [await settled(write(topic)) for topic in ("looms", "weft", "warp", "shed", "reed")]
        assert isinstance(results[0], str)
        assert results[-1] is BudgetExceeded
        usage = scope.account.usage
    assert usage.cached + usage.prefilled + usage.decoded < 80 + 60


async def test_another_model_is_refused(fast_runtime):
    async with fast_runtime(), program("other"):
        with pytest.raises(DSLError, match="this runtime runs 'fast', not 'large'"):
            await write.using(model="large")("looms")


# Random graphs: each node takes up to two of the nodes before it.

graphs = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), min_size=1, max_size=7)
slow_property = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


async def build(graph, *, one_by_one: bool):
    """Runs a random graph, all at once or each call awaited before the next is made."""
    variables = []
    for left, right, typed in graph:
        first = variables[left % len(variables)] if variables and left < 7 else f"topic {left}"
        second = variables[right % len(variables)] if variables and right < 7 else f"topic {right}"
        call = locate.using(max_tokens=300)(first) if typed else write(first, second)
        variables.append(call)
        if one_by_one:
            await settled(call)
    return [await settled(variable) for variable in variables]


async def settled(variable):
    try:
        return await variable
    except (OutputError, NodeFailed, BudgetExceeded) as error:
        return type(error)


@given(graph=graphs)
@slow_property
def test_random_graphs_give_what_one_call_after_the_other_gives(fast_runtime, graph):
    async def scenario():
        async with fast_runtime() as runtime:
            async with program("sequential"):
                expected = await build(graph, one_by_one=True)
            async with program("graph") as scope:
                assert await build(graph, one_by_one=False) == expected
                told = {node.node_id: set(node.inputs) for node in scheduler_of(runtime).graph(scope.id).nodes()}
                built = {node.id: {source.id for source in node.inputs} for node in scope.graph.nodes()}
                assert told == built
            await at_rest(runtime)

    asyncio.run(scenario())


@given(graph=graphs, moment=st.floats(0, 0.2))
@slow_property
def test_cancelling_at_any_moment_leaves_nothing(fast_runtime, graph, moment):
    async def scenario():
        async with fast_runtime() as runtime:
            before = asyncio.all_tasks()

            async def workflow():
                async with program("cancelled"):
                    await build(graph, one_by_one=False)

            task = asyncio.create_task(workflow())
            await asyncio.sleep(moment)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await at_rest(runtime)
            await asyncio.sleep(0)
            assert asyncio.all_tasks() - before - {task} == set()
            assert isinstance(await write("afterwards"), str)

    asyncio.run(scenario())
