"""The graph: while it grows, as text and JSON, and before a workflow runs."""

import asyncio
import inspect
import json

import pytest
from support.flows import Plan, double, fail, merge, plan, review, write

from treadle.dsl import Chat, In, compile, gather, llm, program, prompt
from treadle.dsl.errors import CompileError

MERMAID = """\
flowchart TD
    v0["plan"]
    v1["write 0"]
    v2["write 1"]
    v3["merge"]
    v4[["double"]]
    v5(("gather"))
    v1 --> v3
    v2 --> v3
    v3 --> v5
    v4 --> v5
"""


async def workflow(topic: str) -> tuple[str, int]:
    outline = plan(topic)
    notes = write.map(["a", "b"])
    both = await gather(merge(notes), double(2))
    assert outline.node.id == "n1"
    return both


async def test_the_graph_of_a_run_prints_as_mermaid(backend):
    backend.model = lambda text: '{"questions": []}' if "plan" in text else "text"
    async with program("p") as p:
        await workflow("looms")
        assert p.graph.mermaid() == MERMAID


async def test_the_graph_as_json_has_states_times_and_groups(backend):
    backend.model = lambda text: RuntimeError("broken") if "b" in text else "text"
    async with program("p") as p:
        with pytest.raises(RuntimeError):
            await write.map(["a", "b"])
        await asyncio.sleep(0.01)
        double(1)
        graph = json.loads(json.dumps(p.graph.to_json()))
    first, second, third = graph["nodes"]
    assert graph["name"] == "p" and graph["edges"] == []
    assert (first["id"], first["kind"], first["name"], first["state"]) == ("n1", "llm", "write", "done")
    assert (first["group"], first["sample"], second["group"], second["sample"]) == ("g1", 0, "g1", 1)
    assert (second["state"], second["error"]) == ("failed", "RuntimeError: broken")
    assert 0 == first["declared_s"] <= first["started_s"] <= first["finished_s"]
    assert (third["state"], third["started_s"], third["error"]) == ("pending", None, None)
    assert third["location"].startswith(f"{__file__}:")


async def test_names_are_escaped(backend):
    backend.model = lambda text: "text"
    odd = llm(write.fn)
    odd.name = 'a"<b>'
    async with program("p") as p:
        odd("x")
        assert 'v0["a&quot;&lt;b&gt;"]' in p.graph.mermaid()


async def test_nested_programs_share_their_ids():
    async with program("outer") as outer:
        draft = write("x")
        async with program("inner") as inner:
            again = write(draft)
            assert [node.id for node in inner.graph.nodes()] == ["n2", "n1"]
            assert list(inner.graph.dag.edges) == [("n1", "n2")]
            await again
        assert [node.id for node in outer.graph.nodes()] == ["n1"]


def test_compile_gives_the_same_graph_without_running():
    assert compile(workflow, "looms").mermaid() == MERMAID


async def test_compile_works_inside_a_running_loop(backend):
    graph = compile(workflow, "looms")
    assert graph.mermaid() == MERMAID and backend.started == []
    assert {node.state for node in graph.nodes()} == {"pending"}


def test_an_awaited_value_may_be_passed_on():
    @program(deadline=5)
    async def chain(topic: str) -> str:
        draft = await write(topic)
        notes = await write.map(["a", "b"])
        (first,) = await write.n(2)(topic).first()
        verdict = await review(draft)
        return await merge([draft, *notes, first, verdict])

    graph = compile(chain, "looms")
    assert len(graph.nodes()) == 7
    assert {graph.dag.nodes[source]["node"].name for source in graph.dag.predecessors("n7")} == {"write", "review"}


async def branches(topic: str) -> str:
    verdict = await review(topic)  # awaited
    if verdict.score > 1:  # used
        return "good"
    return await write(topic)


USES = {
    "tested": lambda value: not value,
    "iterated over": lambda value: list(value),
    "formatted": lambda value: f"{value}",
    "compared": lambda value: value == 1,
    "indexed": lambda value: value[0],
    "calculated": lambda value: value + 1,
}


def test_a_workflow_that_branches_has_no_graph_and_the_error_names_the_lines():
    lines, start = inspect.getsourcelines(branches)
    awaited = f"{__file__}:{start + next(i for i, line in enumerate(lines) if '# awaited' in line)}"
    used = f"{__file__}:{start + next(i for i, line in enumerate(lines) if '# used' in line)}"
    with pytest.raises(CompileError) as caught:
        compile(branches, "looms")
    message = str(caught.value)
    assert message.startswith(f"{used}: the value of review ({awaited}), awaited at {awaited}, is asked for its .score")


@pytest.mark.parametrize("use", USES)
def test_every_use_of_a_value_is_noticed(use):
    async def uses(topic: str) -> None:
        USES[use](await write(topic))

    with pytest.raises(CompileError, match=use):
        compile(uses, "x")


def test_streams_and_conversations_have_no_graph_before_they_run():
    async def streams() -> None:
        async for _ in write("x").stream():
            pass

    async def talks() -> None:
        await Chat(tools=[fail]).ask("x")

    for flow in (streams, talks):
        with pytest.raises(CompileError, match="has no graph before it runs"):
            compile(flow)


def test_errors_of_the_workflow_pass_through_compile():
    async def broken() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        compile(broken)


async def test_bodies_are_not_run_by_compile():
    ran = []

    @llm
    async def noting(text: In[str]) -> Plan:
        ran.append(text)
        return prompt(text)

    async def flow() -> Plan:
        return await noting("x")

    assert len(compile(flow).nodes()) == 1 and ran == []
