"""Many calls at once: map, samples of one prompt, gather."""

import asyncio
import itertools

import pytest
from support.flows import Review, merge, review, write

from treadle.dsl import gather, llm, program, prompt
from treadle.dsl.errors import DSLError, NodeCancelled


def numbered(*answers):
    """A model that gives one answer after another, each as (text, seconds) or an exception."""
    count = itertools.count()

    async def model(text):
        answer = answers[next(count)]
        if isinstance(answer, Exception):
            return answer
        await asyncio.sleep(answer[1])
        return answer[0]

    return model


async def test_map_makes_one_call_for_each_item_in_one_group(backend):
    async with program("p"):
        notes = write.map(["a", "b"], style="brief")
        assert await notes == ["write a brief", "write b brief"]
        nodes = [var.node for var in notes]
        assert len({node.group for node in nodes}) == 1 and [node.sample for node in nodes] == [0, 1]
        assert all(node.fork_of is None for node in nodes)
        other = write.map(notes)
        assert other[0].node.group != nodes[0].group and other[1].node.inputs == (nodes[1],)
        assert await write.map([]) == []


async def test_samples_fork_one_prompt_whose_body_runs_once(backend):
    runs = []

    @llm(seed=7)
    async def think(text: str) -> str:
        runs.append(text)
        await asyncio.sleep(0)
        return prompt(text)

    async with program("p"):
        samples = think.n(3)("x")
        assert await samples == ["x", "x", "x"]
        first, *rest = (var.node for var in samples)
        assert runs == ["x"]
        assert first.fork_of is None and all(node.fork_of is first for node in rest)
        assert [node.options.seed for node in (first, *rest)] == [7, 8, 9]
        assert len({node.group for node in (first, *rest)}) == 1


async def test_first_keeps_the_quickest_and_cancels_the_others(backend):
    backend.model = numbered(("slow", 60), ("quick", 0.01), ("second", 0.05))
    async with program("p"):
        samples = write.n(3)("x")
        assert await samples.first(2) == ["quick", "second"]
        assert [var.node.state for var in samples] == ["cancelled", "done", "done"]
        with pytest.raises(NodeCancelled):
            await samples[0]


async def test_first_leaves_out_failures_while_enough_samples_remain(backend):
    backend.model = numbered(RuntimeError("one"), ("good", 0.01), RuntimeError("two"))
    async with program("p"):
        assert await write.n(3)("x").first() == ["good"]
    backend.model = numbered(RuntimeError("one"), ("good", 0.01), RuntimeError("two"))
    async with program("p"):
        with pytest.raises(RuntimeError, match="one"):
            await write.n(3)("x").first(2)


async def test_best_and_vote_choose_among_what_succeeded(backend):
    backend.model = numbered(("bb", 0.02), RuntimeError("one"), ("ccc", 0), ("ddd", 0.01))
    async with program("p"):
        assert await write.n(4)("x").best(key=len) == "ccc"
    backend.model = numbered(('{"score": 1}', 0.02), ('{"score":2}', 0), ('{"score": 2, "fix": ""}', 0.01))
    async with program("p"):
        assert await review.n(3)("x").vote() == Review(score=2)
    backend.model = numbered(("b", 0.02), ("a", 0))
    async with program("p"):
        assert await write.n(2)("x").vote() == "b"
    backend.model = numbered(RuntimeError("all"), RuntimeError("fail"))
    async with program("p"):
        with pytest.raises(RuntimeError, match="all"):
            await write.n(2)("x").vote()


async def test_counts_that_cannot_be_are_errors():
    async with program("p"):
        with pytest.raises(DSLError, match=r"n\(0\)"):
            write.n(0)
        with pytest.raises(DSLError, match=r"first\(3\) of 2"):
            await write.n(2)("x").first(3)


async def test_gather_joins_values_of_different_types(backend):
    backend.model = lambda text: '{"score": 1}' if "review" in text else "text"
    async with program("p") as p:
        both = gather(write("x"), review("y"))
        assert both.node.kind == "gather" and len(both.node.inputs) == 2
        assert await both == ("text", Review(score=1))
        assert both.value_text() == '["text",{"score":1.0,"fix":""}]'
        assert await gather() == ()
        assert both.node in p.graph.nodes()


async def test_gather_fails_with_its_first_failure(backend):
    backend.model = numbered(("slow", 60), RuntimeError("broken"))
    async with program("p"):
        joined = gather(write("x"), write("y"))
        with pytest.raises(Exception, match="broken") as caught:
            await asyncio.wait_for(asyncio.ensure_future(_awaited(joined)), 5)
        assert [step.name for step in caught.value.path] == ["gather", "write"]


async def test_a_list_in_a_prompt_is_its_lines_and_its_edges(backend):
    async with program("p"):
        notes = write.map(["a", "b"])
        merged = merge(notes)
        await merged
        assert "merge:\nwrite a plain\nwrite b plain" in backend.prompts[-1]
        assert merged.node.inputs == tuple(var.node for var in notes)


async def _awaited(var):
    return await var
