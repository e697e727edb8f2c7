"""`@llm`: from a typed function to a prompt and back to a value."""

import asyncio
import enum
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field
from support.fake_backend import Reply
from support.flows import Review, review, write
from typing_extensions import TypedDict

from treadle.dsl import In, llm, program, prompt
from treadle.dsl.errors import DSLError, OutputError, PromptError, SchemaViolation
from treadle.dsl.node import LLMOptions
from treadle.dsl.schema import OutputTypeError, output_type


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Point(TypedDict):
    x: int


WRITTEN = {
    "str": (str, "any {text}", "any {text}"),
    "model": (Review, '{"score": 1}', Review(score=1)),
    "number": (float, "1.5", 1.5),
    "bool": (bool, "true", True),
    "list": (list[int], "[1, 2]", [1, 2]),
    "dict": (dict[str, int], '{"a": 1}', {"a": 1}),
    "typed dict": (Point, '{"x": 1}', {"x": 1}),
    "literal": (Literal["yes", "no"], " yes\n", "yes"),
    "enum": (Colour, "red", Colour.RED),
    "optional": (int | None, "null", None),
    "annotated": (Annotated[int, Field(le=5)], "5", 5),
}


@pytest.mark.parametrize(("annotation", "text", "value"), WRITTEN.values(), ids=WRITTEN)
def test_what_a_model_writes_is_read_as_the_declared_type(annotation, text, value):
    assert output_type(annotation, "f").parse(text) == value


@pytest.mark.parametrize(
    ("annotation", "schema", "choices"),
    [
        (str, None, None),
        (Literal["yes", "no"], None, ("yes", "no")),
        (Colour, None, ("red", "blue")),
        (Literal[1, 2], {"enum": [1, 2], "type": "integer"}, None),
        (list[int], {"items": {"type": "integer"}, "type": "array"}, None),
        (Annotated[int, Field(ge=1)], {"minimum": 1, "type": "integer"}, None),
    ],
)
def test_the_type_gives_a_schema_or_choices(annotation, schema, choices):
    output = output_type(annotation, "f")
    assert (output.schema, output.choices) == (schema, choices)


def test_a_model_gives_a_schema_without_titles():
    assert output_type(Review, "f").schema == {
        "properties": {"score": {"type": "number"}, "fix": {"default": "", "type": "string"}},
        "required": ["score"],
        "type": "object",
    }


@pytest.mark.parametrize("annotation", [object(), type("Plain", (), {})])
def test_a_type_that_cannot_be_written_is_an_error(annotation):
    with pytest.raises(OutputTypeError, match="a model cannot write"):
        output_type(annotation, "f")


async def test_a_call_becomes_a_node_with_its_options_and_its_line(backend):
    backend.model = lambda text: '{"score": 1}'
    async with program("p"):
        verdict = review.using(temperature=0, stop="\n", timeout="2s")("text")
        node = verdict.node
        assert node.options == LLMOptions(temperature=0, stop=("\n",), timeout=2.0)
        assert (node.name, node.kind, node.state, node.output_type) == ("review", "llm", "pending", Review)
        assert node.location.file == __file__
        assert await verdict == Review(score=1)
        assert node.state == "done" and node.declared_at <= node.started_at <= node.finished_at
        assert review.options == LLMOptions()


async def test_messages_and_system_texts(backend):
    @llm(system="From the decorator.")
    async def ask(text: In[str]) -> str:
        return prompt(f"ask {text}")

    @llm
    async def talk(text: In[str]) -> str:
        return prompt(
            [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "yes?"},
                {"role": "user", "content": text},
            ],
            system=f"About {text}",
        )

    async with program("p"):
        x = write("x")
        await ask(x)
        assert backend.prompts[-1] == "system: From the decorator.\nuser: ask write x plain"
        await talk(x)
        assert backend.prompts[-1] == "system: About write x plain\nuser: hi\nassistant: yes?\nuser: write x plain"


async def test_a_body_that_returns_a_value_skips_the_model(backend):
    @llm
    async def cached(text: str) -> Review:
        if text == "known":
            return Review(score=3)
        if text == "wrong":
            return "no review"
        return prompt(text)

    backend.model = lambda text: '{"score": 1}'
    async with program("p"):
        assert await cached("known") == Review(score=3)
        assert backend.prompts == []
        assert await cached("new") == Review(score=1)
        with pytest.raises(OutputError, match="cached"):
            await cached("wrong")


async def test_output_that_does_not_fit_is_an_error_after_the_retries(backend):
    answers = iter(['{"score": "high"}', "nothing", '{"score": 2}'])
    backend.model = lambda text: next(answers)
    async with program("p"):
        with pytest.raises(OutputError, match=r"does not fit Review: score: .*\(got 'high'\)"):
            await review("text")
        assert await review.using(retries=1)("text") == Review(score=2)


class Numbers(BaseModel):
    even: Annotated[list[int], Field(json_schema_extra={"uniqueItems": True})]


@llm
async def numbers(text: str) -> Numbers:
    return prompt(text)


async def test_what_no_grammar_enforces_is_asked_for_again_twice(backend):
    backend.model = lambda text: '{"even":[2,2]}'
    async with program("p"):
        with pytest.raises(SchemaViolation, match=r"numbers.*'uniqueItems' at /even does not hold: \[2, 2\]") as caught:
            await numbers("text")
        assert (caught.value.keyword, caught.value.path, caught.value.value) == ("uniqueItems", "/even", [2, 2])
        assert len(backend.prompts) == len(set(backend.prompts)) == 3
        with pytest.raises(OutputTypeError, match="'uniqueItems' at /properties/even/uniqueItems cannot be enforced"):
            await numbers.using(strict=True)("text")
        backend.model = lambda text: '{"even":[2,4]}' if "not right" in text else '{"even":[2,2]}'
        assert await numbers("text") == Numbers(even=[2, 4])


async def test_a_body_that_raises_fails_the_call_with_its_own_error():
    @llm
    async def broken(text: str) -> str:
        raise KeyError(text)

    async with program("p"):
        with pytest.raises(KeyError, match="x"):
            await broken("x")


async def test_a_body_may_await_what_it_takes(backend):
    @llm
    async def shout(text: In[str]) -> str:
        await asyncio.sleep(0)
        return prompt((await text if not isinstance(text, str) else text).upper())

    async with program("p"):
        assert await shout(write("x")) == "WRITE X PLAIN"


async def test_preview_shows_the_prompt_and_calls_nothing(backend):
    assert await review.preview("text") == "user:\nreview [text]"
    async with program("p"):
        draft = write("x")
        assert await review.preview(draft) == "user:\nreview [<write>]"
        await draft
        assert await review.using(system="Be strict.").preview(draft) == (
            "system:\nBe strict.\n\nuser:\nreview [write x plain]"
        )
    assert len(backend.started) == 1


async def test_wrong_arguments_are_a_type_error_at_the_call():
    with pytest.raises(TypeError, match=r"write\(\): got an unexpected keyword argument 'stile'"):
        write("x", stile="x")
    with pytest.raises(TypeError, match=r"write\(\): missing"):
        write()


def test_what_cannot_be_an_llm_function_is_refused_where_it_is_written():
    with pytest.raises(DSLError, match="async def"):

        @llm
        def sync(text: str) -> str:
            return text

    with pytest.raises(DSLError, match="no such option: temprature"):
        llm(temprature=1)


async def test_a_function_without_a_result_type_is_an_error():
    @llm
    async def untyped(text: str):
        return prompt(text)

    with pytest.raises(DSLError, match="annotate what untyped returns"):
        untyped("x")


async def test_a_message_that_is_none_is_an_error():
    @llm
    async def wrong(text: str) -> str:
        return prompt([{"role": "robot", "content": text}])

    async with program("p"):
        with pytest.raises(PromptError, match="one of the roles system, user"):
            await wrong("x")


async def test_types_defined_around_the_function_are_found(backend):
    class Local(BaseModel):
        x: int

    @llm
    async def local(text: "In[str]") -> "Local":
        return prompt(text)

    backend.model = lambda text: Reply('{"x": 1}')
    async with program("p"):
        assert await local("t") == Local(x=1)
