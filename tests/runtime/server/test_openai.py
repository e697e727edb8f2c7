"""Chat and completions of a live server, used through the official client."""

from __future__ import annotations

import asyncio
import json
from typing import Literal

import jsonschema
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

MODEL = "smollm2"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": WEATHER_SCHEMA,
        "strict": True,
    },
}
TIME = {"type": "function", "function": {**WEATHER["function"], "name": "get_time", "description": "The time there."}}


class Verdict(BaseModel):
    answer: Literal["yes", "no"]
    certain: bool


@pytest.fixture
def client(smollm2_url):
    with OpenAI(base_url=f"{smollm2_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def exact_client(exact_smollm2_url):
    with OpenAI(base_url=f"{exact_smollm2_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(smollm2_url):
    async with AsyncOpenAI(base_url=f"{smollm2_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, messages=QUESTION, **fields):
    options = {"model": MODEL, "temperature": 0, "max_completion_tokens": 24, **fields}
    return client.chat.completions.create(messages=messages, **options)


def joined(chunks):
    """The choices of a stream put together, and the usage at its end."""
    choices, usage = {}, None
    for chunk in chunks:
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for part in chunk.choices:
            first = part.index not in choices
            choice = choices.setdefault(part.index, {"content": "", "tool_calls": [], "finish_reason": None})
            assert choice["finish_reason"] is None, "a chunk after the last one of its choice"
            assert (part.delta.role == "assistant") == first
            choice["content"] += part.delta.content or ""
            for call in part.delta.tool_calls or []:
                if call.index == len(choice["tool_calls"]):
                    choice["tool_calls"].append({"id": call.id, "name": call.function.name, "arguments": ""})
                choice["tool_calls"][call.index]["arguments"] += call.function.arguments
            choice["finish_reason"] = part.finish_reason
    return choices, usage


def test_a_question_is_answered(client):
    completion = ask(client)
    (choice,) = completion.choices
    assert "Paris" in choice.message.content
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
    assert completion.object == "chat.completion" and completion.model == MODEL and completion.id
    usage = completion.usage
    assert usage.prompt_tokens > 10 and 0 < usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_says_the_same_as_the_whole_answer(client):
    whole = ask(client)
    choices, usage = joined(ask(client, stream=True, stream_options={"include_usage": True}))
    assert choices[0]["content"] == whole.choices[0].message.content
    assert choices[0]["finish_reason"] == whole.choices[0].finish_reason
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens > 0, "the same prompt was computed before"


async def test_the_async_client_streams_several_answers_at_once(async_client):
    async def one():
        return [chunk async for chunk in await ask(async_client, stream=True)]

    texts = {joined(chunks)[0][0]["content"] for chunks in await asyncio.gather(*(one() for _ in range(4)))}
    assert len(texts) == 1


def test_the_streaming_helper_of_the_client_follows(client):
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=24
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content


def test_a_required_tool_is_called_with_arguments_of_its_schema(client):
    completion = ask(
        client, tools=[WEATHER, TIME], tool_choice="required", parallel_tool_calls=False, max_completion_tokens=96
    )
    (choice,) = completion.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert call.function.name in ("get_weather", "get_time") and call.id.startswith("call_")
    jsonschema.validate(json.loads(call.function.arguments), WEATHER_SCHEMA)


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "function": {"name": "get_time"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "required",
                "tools": [{"type": "function", "function": {"name": "get_time"}}],
            },
        },
    ],
    ids=["named", "allowed"],
)
def test_only_the_tools_that_are_chosen_are_called(client, choice):
    completion = ask(client, tools=[WEATHER, TIME], tool_choice=choice, max_completion_tokens=96)
    assert {call.function.name for call in completion.choices[0].message.tool_calls} == {"get_time"}


def test_a_streamed_tool_call_comes_in_pieces_that_join_to_the_whole_call(client):
    options = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "max_completion_tokens": 96}
    (whole,) = ask(client, **options).choices[0].message.tool_calls
    chunks = list(ask(client, stream=True, **options))
    choices, _ = joined(chunks)
    (call,) = choices[0]["tool_calls"]
    assert (call["name"], call["arguments"]) == (whole.function.name, whole.function.arguments)
    assert choices[0]["finish_reason"] == "tool_calls" and choices[0]["content"] == ""
    pieces = [part for chunk in chunks for choice in chunk.choices for part in choice.delta.tool_calls or []]
    assert len(pieces) > 3, "the arguments came at once"


def test_a_tool_result_goes_back_and_the_prompt_extends_what_was_computed(client):
    first = ask(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_completion_tokens=96)
    message = first.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21 degrees"}
    messages = [*QUESTION, message.model_dump(exclude_none=True), result]
    second = ask(client, messages, tools=[WEATHER], tool_choice="none")
    assert second.choices[0].message.tool_calls is None and second.choices[0].message.content
    cached = second.usage.prompt_tokens_details.cached_tokens
    # All of the first turn but its last token, which was never computed, and perhaps the rest of a page.
    assert first.usage.total_tokens - 16 - 2 <= cached < second.usage.prompt_tokens


def test_structured_output_is_parsed(client):
    completion = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Is the sky green?"}],
        response_format=Verdict,
        max_completion_tokens=48,
    )
    assert isinstance(completion.choices[0].message.parsed, Verdict)


def test_tools_and_structured_output_go_together(client):
    tool = openai.pydantic_function_tool(Verdict, name="give_verdict")
    schema = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": Verdict.model_json_schema()}}
    for choice in ("auto", "none"):
        message = (
            ask(client, tools=[tool], tool_choice=choice, response_format=schema, max_completion_tokens=200)
            .choices[0]
            .message
        )
        assert message.tool_calls is None or choice == "auto"
        for text in [call.function.arguments for call in message.tool_calls or []] or [message.content]:
            Verdict.model_validate_json(text)


def test_parse_reads_the_arguments_of_tools(client):
    completion = client.chat.completions.parse(
        model=MODEL,
        messages=QUESTION,
        tools=[openai.pydantic_function_tool(Verdict)],
        tool_choice="required",
        parallel_tool_calls=False,
        max_completion_tokens=96,
    )
    (call,) = completion.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Verdict)


def test_json_mode_gives_an_object(client):
    text = ask(
        client,
        [{"role": "user", "content": "Give the JSON object of Paris with name and country."}],
        response_format={"type": "json_object"},
        max_completion_tokens=200,
    ).choices[0]
    if text.finish_reason == "stop":
        assert isinstance(json.loads(text.message.content), dict)
    assert text.message.content.startswith("{")


def test_several_answers_share_a_prompt(exact_client):
    completion = ask(exact_client, n=3, temperature=1, seed=7, max_completion_tokens=8)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in completion.choices}) > 1
    assert completion.usage.completion_tokens <= 3 * 8
    chunks = ask(exact_client, n=3, temperature=1, seed=7, max_completion_tokens=8, stream=True)
    streamed, _ = joined(chunks)
    assert [streamed[i]["content"] for i in range(3)] == [choice.message.content for choice in completion.choices]


def test_logprobs_spell_the_answer(client):
    completion = ask(client, logprobs=True, top_logprobs=3, max_completion_tokens=6)
    choice = completion.choices[0]
    entries = choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and entry.logprob <= 0
        assert max(entry.top_logprobs, key=lambda other: other.logprob).token == entry.token, "temperature is 0"
    streamed = ask(client, logprobs=True, top_logprobs=3, max_completion_tokens=6, stream=True)
    again = [entry for chunk in streamed for c in chunk.choices if c.logprobs for entry in c.logprobs.content]
    assert [entry.token for entry in again] == [entry.token for entry in entries]


def test_plain_text_is_gone_on_from(client):
    completion = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0)
    assert "Paris" in completion.choices[0].text
    chunks = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == completion.choices[0].text


def test_the_client_finds_the_model(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "treadle"


def test_errors_are_those_of_the_client(client):
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(client, model="gpt-5")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model=MODEL, input="text")
