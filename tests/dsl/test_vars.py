"""Variables: values that will exist, and what happens to those who take them for values."""

import asyncio
import gc
import inspect
import logging

import pytest
from pydantic import BaseModel
from support.flows import Review, plan, review, write

from treadle.dsl import Program, Var, VarList, program, value
from treadle.dsl.errors import NodeFailed, VarUseError
from treadle.dsl.node import Node
from treadle.dsl.var import text_of


def a_var(backend, name="score") -> Var:
    return Node(Program("p", backend), "llm", name).output


def line_of(text: str) -> int:
    """The number of the caller's only line that ends with a text."""
    lines, start = inspect.getsourcelines(inspect.currentframe().f_back.f_code)
    return start + next(index for index, line in enumerate(lines) if line.rstrip().endswith(text))


MISUSES = {
    "if": lambda score: 1 if score else 2,
    "not": lambda score: not score,
    "for": lambda score: [item for item in score],  # noqa: C416
    "index": lambda score: score[0],
    "len": lambda score: len(score),
    "in": lambda score: "x" in score,
    "<": lambda score: score < 1,
    "reversed >=": lambda score: score >= 1,
    "==": lambda score: score == 1,
    "!=": lambda score: score != 1,
    "+": lambda score: score + 1,
    "reversed +": lambda score: "a" + score,
    "int": lambda score: int(score),
    "attribute": lambda score: score.fix,
    "format spec": lambda score: f"{score.value:.2f}",
}


@pytest.mark.parametrize("misuse", MISUSES.values(), ids=MISUSES)
def test_using_a_variable_as_its_value_names_the_line_and_the_fix(backend, misuse):
    with pytest.raises(VarUseError) as caught:
        misuse(a_var(backend))
    message = str(caught.value)
    assert message.startswith(f"{__file__}:{misuse.__code__.co_firstlineno}: ")
    assert "await score" in message


def test_variables_compare_and_hash_by_identity(backend):
    first, second = a_var(backend), a_var(backend)
    assert first == first and first != second and first in [second, first] and len({first, second, first}) == 2


async def test_a_value_can_be_awaited_often_and_by_many():
    async with program("p"):
        draft = write("looms")
        assert isinstance(draft, Var)
        assert (
            await asyncio.gather(*(asyncio.ensure_future(value(draft)) for _ in range(3))) == ["write looms plain"] * 3
        )
        assert await draft == "write looms plain"
        assert await value("plain value") == "plain value"


async def test_a_stream_gives_every_consumer_all_pieces_from_the_beginning():
    async with program("p"):
        draft = write("looms")
        early = asyncio.ensure_future(_collected(draft))
        await draft
        assert await early == await _collected(draft) == ["write", " looms", " plain"]


async def test_pieces_carry_token_ids_and_a_value_that_was_not_streamed_is_one_piece(backend):
    backend.model = lambda text: '{"score": 1, "fix": "none"}' if "review" in text else "a bc"
    async with program("p"):
        draft = write("looms")
        assert [piece async for piece in draft.pieces()] == [("a", (1,)), (" bc", (2,))]
        verdict = review(draft)
        assert [text async for text in verdict.stream()] == ['{"score": 1, "fix": "none"}']
        assert await verdict == Review(score=1, fix="none")


def test_what_was_not_pushed_comes_as_the_last_piece(backend):
    var = a_var(backend)
    var.push("ab", (1, 2))
    assert var.resolve("abc", (1, 2, 3), "abc") and not var.resolve("other")
    assert asyncio.run(_pieces(var)) == [("ab", (1, 2)), ("c", (3,))]


async def _pieces(var):
    return [piece async for piece in var.pieces()]


async def test_a_stream_raises_the_failure_after_what_had_come(backend):
    var = a_var(backend)
    var.push("begun")
    var.fail(RuntimeError("broken"))
    pieces = var.pieces()
    assert await anext(pieces) == ("begun", ())
    with pytest.raises(RuntimeError, match="broken"):
        await anext(pieces)


async def _collected(var):
    return [text async for text in var.stream()]


async def test_a_failure_reaches_dependents_with_its_path(backend):
    def model(text):
        return RuntimeError("out of yarn") if text.startswith("user: plan") else "text"

    backend.model = model
    async with program("p"):
        outline = plan("looms")  # here
        draft = write(outline)
        verdict = review(draft)
        with pytest.raises(NodeFailed) as caught:
            await verdict
        with pytest.raises(RuntimeError, match="out of yarn"):
            await outline
    error = caught.value
    assert [step.name for step in error.path] == ["review", "write", "plan"]
    assert error.path[-1].location == (__file__, line_of("# here"))
    assert str(error.cause) == "out of yarn" and error.__cause__ is error.cause
    assert f"needs plan ({__file__}:{line_of('# here')})" in str(error) and "out of yarn" in str(error)
    assert [node.state for node in (outline.node, draft.node, verdict.node)] == ["failed"] * 3


async def test_a_failure_that_nobody_awaits_is_silent(backend, caplog, recwarn):
    backend.model = lambda text: RuntimeError("unseen")
    with caplog.at_level(logging.DEBUG):
        async with program("p"):
            draft = write("looms")
            await asyncio.sleep(0.01)
            assert draft.error is not None
        del draft
        backend.started.clear()
        gc.collect()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert list(recwarn) == []


async def test_a_list_raises_the_first_failure_without_waiting_for_the_rest(backend):
    async def model(text):
        if "bad" in text:
            return RuntimeError("bad one")
        await asyncio.sleep(60)

    backend.model = model
    async with program("p"):
        drafts = write.map(["slow", "bad"])
        with pytest.raises(RuntimeError, match="bad one"):
            await asyncio.wait_for(_awaited(drafts), 5)


async def _awaited(variables):
    return await variables


def test_a_list_is_a_sequence_of_variables(backend):
    variables = [a_var(backend), a_var(backend)]
    both = VarList(variables)
    assert len(both) == 2 and list(both) == variables and both[1] is variables[1] and list(both[1:]) == variables[1:]


def test_values_are_written_as_text_or_as_compact_json():
    class Point(BaseModel):
        x: int

    assert text_of("a\nb") == "a\nb"
    assert text_of(Point(x=1)) == '{"x":1}'
    assert text_of([Point(x=1), "ü", None]) == '[{"x":1},"ü",null]'
