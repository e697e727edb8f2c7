"""Keywords that no grammar can enforce: validated afterwards and asked for again, or refused; never dropped."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field
from support.fake_backend import FakeBackend

from treadle.dsl import Chat, Program, llm, program, prompt, tool
from treadle.dsl.errors import DSLError, OutputCutOff, OutputError, SchemaViolation
from treadle.dsl.node import LLMOptions
from treadle.dsl.schema import OutputTypeError, output_type
from treadle.dsl.turn import ChatNode
from treadle.grammar import UnsupportedSchemaError
from treadle.runtime.executor.outputs import OutputCheck
from treadle.scheduler import SubmitCall

UNIQUE = {"uniqueItems": True}


class Twins(BaseModel):
    """Which no output satisfies, as only the keyword that the grammar leaves open says."""

    sides: Annotated[list[Literal["left"]], Field(min_length=2, max_length=2, json_schema_extra=UNIQUE)]


class Pair(BaseModel):
    sides: Annotated[list[Literal["left", "right"]], Field(min_length=2, max_length=2, json_schema_extra=UNIQUE)]


class Side(BaseModel):
    """With nothing in it that a grammar cannot enforce."""

    side: Literal["left", "right"]


@llm(max_tokens=60)
async def twins(text: str) -> Twins:
    return prompt(f"Which sides does {text} have?")


@llm(max_tokens=60)
async def pair(text: str) -> Pair:
    return prompt(f"Which sides does {text} have?")


@llm(max_tokens=60)
async def side(text: str) -> Side:
    return prompt(f"On which side is {text}?")


@pytest.fixture
def submitted(monkeypatch):
    """Every call that is sent to an engine."""
    from treadle.runtime.engine.session import Session

    calls: list[SubmitCall] = []
    submit = Session.submit

    def recording(self: Session, *given: SubmitCall) -> Any:
        calls.extend(given)
        return submit(self, *given)

    monkeypatch.setattr(Session, "submit", recording)
    return calls


async def test_a_violation_names_keyword_path_and_value_after_two_retries(fast_runtime):
    async with fast_runtime(), program("open") as scope:
        with pytest.raises(SchemaViolation, match=r"'uniqueItems' at /sides does not hold.*more retries") as caught:
            await twins("a loom")
        assert isinstance(await side("a loom"), Side)
    error = caught.value
    assert (error.keyword, error.path, error.value) == ("uniqueItems", "/sides", ["left", "left"])
    assert scope.account.calls == 3 + 1


@pytest.mark.parametrize(("retries", "calls"), [(0, 1), (1, 2), (4, 5)])
async def test_retries_are_as_many_as_was_said(fast_runtime, retries, calls):
    async with fast_runtime(), program("open") as scope:
        with pytest.raises(SchemaViolation):
            await twins.using(retries=retries)("a loom")
    assert scope.account.calls == calls


async def test_a_greedy_retry_is_told_what_was_wrong_and_a_sampled_one_has_another_seed_too(
    fast_runtime, tokenizer, submitted
):
    async with fast_runtime(), program("open"):
        for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 5}):
            submitted.clear()
            with pytest.raises(SchemaViolation):
                await twins.using(**options)("a loom")
            first, second, third = submitted
            for call, longer in ((first, second), (second, third)):
                told = tokenizer.decode(longer.token_ids[len(call.token_ids) :])
                assert longer.token_ids[: len(call.token_ids)] == call.token_ids
                assert '{"sides":["left","left"]}' in told
                assert "'uniqueItems' at /sides does not hold" in told and __file__ not in told
            assert len({call.sampling.seed for call in submitted}) == 3
            assert {call.sampling.temperature for call in submitted} == {options["temperature"]}


async def test_a_retry_may_bring_what_satisfies_the_schema(fast_runtime):
    calls = set()
    async with fast_runtime():
        for seed in range(12):
            async with program("open") as scope:
                value = await pair.using(temperature=1.0, seed=seed, retries=20)("a loom")
            assert sorted(value.sides) == ["left", "right"]
            calls.add(scope.account.calls)
    assert 1 in calls and len(calls) > 1, "some seeds need no retry, and some do"


async def test_strict_refuses_the_keyword_by_name_before_anything_is_generated(fast_runtime, submitted):
    async with fast_runtime(), program("strict"):
        with pytest.raises(OutputTypeError, match=r"pair.*'uniqueItems' at /properties/sides/uniqueItems") as caught:
            await pair.using(strict=True)("a loom")
        assert isinstance(caught.value.__cause__, UnsupportedSchemaError)
        assert submitted == []
        assert isinstance(await side.using(strict=True)("a loom"), Side)


async def test_what_the_grammar_expresses_is_asked_for_once_and_streams(fast_runtime, submitted):
    async with fast_runtime(), program("closed"):
        values = [side.using(temperature=1.5, seed=seed)("a loom") for seed in range(8)]
        pieces = [text async for text in values[0].stream()]
        assert len(pieces) > 1
        assert all([isinstance(await value, Side) for value in values])
    assert len(submitted) == 8


async def test_an_output_that_is_cut_off_is_not_asked_for_again(fast_runtime, submitted):
    async with fast_runtime(), program("cut"):
        with pytest.raises(OutputCutOff, match="cut off after 3 tokens; give a larger max_tokens"):
            await twins.using(max_tokens=3, retries=5)("a loom")
    assert len(submitted) == 1


async def test_text_that_reaches_max_tokens_is_an_answer_and_a_typed_answer_is_an_error_that_says_what_to_do(
    fast_runtime,
):
    async with fast_runtime(), program("cut"):
        text = await Chat(max_tokens=5).ask("Tell me.")
        assert isinstance(text, str) and text
        with pytest.raises(OutputCutOff, match=r"chat .*cut off after 5 tokens; give a larger max_tokens"):
            await Chat(returns=Side, max_tokens=5).ask("Tell me.")


def test_a_turn_that_ends_within_a_tool_call_is_not_an_answer():
    @tool
    def look() -> str:
        return ""

    scope = Program("p", FakeBackend())
    for tools, text, whole in (
        ((look,), '<tool_call>\n{"name": "lo', True),
        ((look,), "I shall lo", False),
        ((), "<tool_call> is a tag", False),
    ):
        options = LLMOptions(tools=tools)
        node = ChatNode(scope, (), (), output_type(str, "chat"), options, runs_tools=False, extends=None)
        assert OutputCheck(node, ()).must_be_whole(text) is whole


async def test_a_correction_that_does_not_fit_the_context_leaves_the_first_error(fast_runtime):
    async with fast_runtime(max_context=100), program("small"):
        with pytest.raises(SchemaViolation):
            await twins.using(max_tokens=30)("a loom")


async def test_a_typed_answer_of_a_conversation_is_asked_for_again_and_the_next_turn_goes_on(fast_runtime, submitted):
    async with fast_runtime(), program("chat") as scope:
        chat = Chat(returns=Twins, max_tokens=60)
        with pytest.raises(SchemaViolation):
            await chat.ask("Which sides?")
        assert len(submitted) == 3 and chat.messages == ()
        chat = Chat(returns=Pair, max_tokens=60, temperature=1.0, seed=3, retries=20)
        for _ in range(2):
            assert sorted((await chat.ask("Which sides?")).sides) == ["left", "right"]
        assert "not right" not in str(chat.messages)
    assert scope.account.calls == len(submitted)


@pytest.mark.parametrize("options", [{"retries": -1}, {"max_tokens": 0}])
def test_options_that_cannot_be_are_refused_where_they_are_written(options):
    with pytest.raises(DSLError, match=f"{next(iter(options))} is .*; it must be at least"):
        pair.using(**options)


async def test_the_body_s_own_value_is_not_asked_for_again(fast_runtime, submitted):
    @llm
    async def given() -> Pair:
        return {"sides": ["up"]}  # type: ignore[return-value]

    async with fast_runtime(), program("given"):
        with pytest.raises(OutputError, match="sides"):
            await given()
    assert submitted == []
