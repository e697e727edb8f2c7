"""Tools: described by their hints and docstring, checked, run as nodes."""

import asyncio
import contextlib
import time
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from support.flows import double, fail, write

from treadle.dsl import In, program, tool
from treadle.dsl.docstring import parameter_summaries, summary
from treadle.dsl.duration import DurationError, seconds
from treadle.dsl.errors import DSLError, NodeFailed, ToolArgumentsError, ToolError, ToolTimeout


class Place(BaseModel):
    city: str


@tool(name="find", typical="2s", timeout=10, retries=1, effects="read", concurrency=4)
async def search(
    query: In[str], limit: Annotated[int, Field(ge=1, le=20)] = 5, *, where: Place | None = None, copy: bool = False
) -> list[str]:
    """Search the index.
    It is large.

    More about it.

    Args:
        query (str): What to look for,
            in words.
        limit: Most results: at least one.
        copy: Shadows a method of pydantic's models.

    Returns:
        query: The results.
    """
    return [f"{query} {where}"] * limit


def test_a_tool_keeps_what_was_said_of_it():
    assert (search.name, search.description) == ("find", "Search the index. It is large.")
    assert (search.typical, search.timeout, search.retries) == (2.0, 10.0, 1)
    assert (search.effects, search.concurrency) == ("read", 4)
    assert tool(lambda: 1).effects == "once"
    assert asyncio.run(search.fn("x", 1)) == ["x None"]


def test_the_schema_comes_from_hints_and_docstring():
    assert search.parameters == {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "What to look for, in words."},
            "limit": {
                "type": "integer",
                "default": 5,
                "minimum": 1,
                "maximum": 20,
                "description": "Most results: at least one.",
            },
            "where": {"anyOf": [{"$ref": "#/$defs/Place"}, {"type": "null"}], "default": None},
            "copy": {"type": "boolean", "default": False, "description": "Shadows a method of pydantic's models."},
        },
        "required": ["query"],
        "additionalProperties": False,
        "$defs": {"Place": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
    }


def test_a_tool_without_parameters_has_an_empty_object():
    @tool
    def now() -> str:
        return "now"

    assert now.parameters == {"type": "object", "properties": {}, "additionalProperties": False}
    assert now.validate("") == now.validate("{}") == {}


def test_arguments_are_validated_from_text_and_from_values():
    expected = {"query": "q", "limit": 5, "where": Place(city="Delft"), "copy": False}
    assert search.validate('{"query": "q", "where": {"city": "Delft"}}') == expected
    assert search.validate({"query": "q", "where": {"city": "Delft"}}) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('{"query": "q", "limit": 50}', "limit: Input should be less than or equal to 20 (got 50)"),
        ('{"limit": 1}', "query: Field required"),
        ('{"query": "q", "limt": 1}', "limt: Extra inputs are not permitted"),
        ('{"query": "q"', "Invalid JSON"),
        ("[1]", "should be an object"),
        ({"query": "q", "where": {"town": 1}}, "where.city: Field required"),
        ({"query": ["x" * 1000]}, "..."),
    ],
)
def test_wrong_arguments_are_explained_in_a_line(arguments, message):
    with pytest.raises(ToolArgumentsError) as caught:
        search.validate(arguments)
    assert str(caught.value).startswith("wrong arguments for find: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@given(st.text() | st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.integers())))
def test_whatever_a_model_writes_validates_or_is_explained(arguments):
    with contextlib.suppress(ToolArgumentsError):
        assert set(search.validate(arguments)) == {"query", "limit", "where", "copy"}


async def test_a_call_is_a_node_whose_variables_are_waited_for(backend):
    async with program("p"):
        query = write("x")
        found = search(query, limit=2)
        assert (found.node.kind, found.node.name, found.node.inputs) == ("tool", "find", (query.node,))
        assert await found == ["write x plain None"] * 2
        assert found.value_text() == '["write x plain None","write x plain None"]'
        nested = search("q", where={"city": query})
        assert nested.node.inputs == (query.node,)
        assert await nested == ["q city='write x plain'"] * 5


async def test_arguments_of_the_workflow_are_checked_too():
    async with program("p"):
        with pytest.raises(ToolArgumentsError, match="limit"):
            await search("q", limit=50)
        with pytest.raises(TypeError, match=r"find\(\): missing"):
            search()


async def test_a_function_that_is_not_async_runs_beside_the_loop():
    @tool
    def slow(number: int) -> int:
        time.sleep(0.1)
        return number

    async with program("p"):
        started = time.monotonic()
        first, second = slow(1), slow(2)
        await asyncio.sleep(0.02)
        assert time.monotonic() - started < 0.09
        assert [await first, await second] == [1, 2]
        assert time.monotonic() - started < 0.19


async def test_a_failure_names_the_tool_and_keeps_its_cause():
    async with program("p"):
        broken = fail("x")
        with pytest.raises(ToolError, match="fail failed: RuntimeError: no luck with x") as caught:
            await broken
        assert isinstance(caught.value.__cause__, RuntimeError)
        with pytest.raises(NodeFailed):
            await double(broken)


async def test_a_tool_that_hangs_times_out():
    @tool(timeout="20ms")
    async def hangs() -> None:
        await asyncio.sleep(60)

    async with program("p"):
        with pytest.raises(ToolTimeout, match=r"longer than 0.02 s"):
            await hangs()


async def test_a_tool_outside_of_a_scope_is_a_program_of_its_own():
    assert await double(double(2)) == 8


def test_retries_need_a_tool_that_may_run_twice():
    with pytest.raises(DSLError, match='effects="read"'):
        tool(retries=1)


def test_parameters_without_a_name_are_refused():
    with pytest.raises(DSLError, match=r"\*numbers"):

        @tool
        def total(*numbers: int) -> int:
            return sum(numbers)


GOOGLE = "Does.\n\nArgs:\n    x: First.\n    y (int, optional): Second,\n        continued.\n\nRaises:\n    z: Not it."
NUMPY = """Does.

Parameters
----------
x : str
    First.
y : int
    Second,
    continued.

Returns
-------
z
    No."""
SPHINX = "Does.\n\n:param x: First.\n:param int y: Second,\n    continued.\n:returns z: No."


@pytest.mark.parametrize("docstring", [GOOGLE, NUMPY, SPHINX], ids=["google", "numpy", "sphinx"])
def test_the_three_styles_of_docstrings_say_the_same(docstring):
    assert parameter_summaries(docstring) == {"x": "First.", "y": "Second, continued."}
    assert summary(docstring) == "Does."


@given(st.text(st.characters() | st.sampled_from("Args:\n :param-x")))
def test_no_docstring_breaks_the_parser(docstring):
    parameter_summaries(docstring)
    summary(docstring)


def test_an_empty_docstring_says_nothing():
    assert parameter_summaries(None) == {} and summary(None) == ""


@pytest.mark.parametrize(
    ("text", "expected"), [("500ms", 0.5), ("2s", 2), (" 1.5 m ", 90), ("2min", 120), ("1h", 3600), (3, 3)]
)
def test_lengths_of_time(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "2", "s", "-1s", "2 days", -1, float("nan"), float("inf")])
def test_what_is_no_length_of_time_is_an_error(text):
    with pytest.raises(DurationError):
        seconds(text)


def test_choices_of_a_parameter_are_an_enum_in_the_schema():
    @tool
    def turn(to: Literal["left", "right"]) -> str:
        return to

    assert turn.parameters["properties"]["to"] == {"type": "string", "enum": ["left", "right"]}
