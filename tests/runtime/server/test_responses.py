"""`/v1/responses` of a live server, used through the official client."""

from __future__ import annotations

import json
from typing import Literal

import jsonschema
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

MODEL = "smollm2"
PAGE = 16
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "strict": True,
}
TIME = {**WEATHER, "name": "get_time", "description": "The time in a city."}


class Verdict(BaseModel):
    answer: Literal["yes", "no"]
    certain: bool


@pytest.fixture
def client(smollm2_url):
    with OpenAI(base_url=f"{smollm2_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(smollm2_url):
    async with AsyncOpenAI(base_url=f"{smollm2_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, question="What is the capital of France?", **fields):
    return client.responses.create(model=MODEL, input=question, **{"temperature": 0, "max_output_tokens": 24, **fields})


def collected(events):
    """The final response of a stream, and the output as it follows from added items and deltas alone."""
    items, final = [], None
    for number, event in enumerate(events):
        assert event.sequence_number == number
        match event.type:
            case "response.output_item.added":
                assert event.output_index == len(items)
                items.append(event.item.to_dict())
            case "response.content_part.added":
                assert event.item_id == items[event.output_index]["id"]
                items[event.output_index]["content"] = [event.part.to_dict()]
            case "response.output_text.delta":
                items[event.output_index]["content"][0]["text"] += event.delta
            case "response.function_call_arguments.delta":
                assert event.item_id == items[event.output_index]["id"]
                items[event.output_index]["arguments"] += event.delta
            case "response.output_item.done":
                items[event.output_index]["status"] = event.item.status
            case "response.completed" | "response.incomplete" | "response.failed":
                final = event.response
    return final, items


def test_a_question_is_answered(client):
    response = ask(client, metadata={"k": "v"})
    assert "Paris" in response.output_text
    assert response.status in ("completed", "incomplete") and response.object == "response"
    assert response.usage.input_tokens > 10 and 0 < response.usage.output_tokens <= 24
    assert response.metadata == {"k": "v"} and response.error is None


def test_a_stream_says_the_same_as_the_whole_answer(client):
    whole = ask(client)
    final, items = collected(ask(client, stream=True))
    assert [item.to_dict() for item in final.output] == items
    assert final.output_text == whole.output_text
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_the_helper_for_streams_gives_the_final_response(client):
    with client.responses.stream(model=MODEL, input="Say yes.", temperature=0, max_output_tokens=200) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.status == "completed" and "".join(pieces) == final.output_text


async def test_the_asynchronous_client_streams_too(async_client):
    stream = await async_client.responses.create(
        model=MODEL, input="What is the capital of France?", temperature=0, max_output_tokens=24, stream=True
    )
    final, items = collected([event async for event in stream])
    assert [item.to_dict() for item in final.output] == items and "Paris" in final.output_text


def test_an_answer_that_reached_its_limit_is_incomplete(client):
    final, _ = collected(ask(client, "Write a long story about a fox.", max_output_tokens=5, stream=True))
    assert final.status == "incomplete" and final.incomplete_details.reason == "max_output_tokens"
    assert final.output[0].status == "incomplete" and final.usage.output_tokens == 5


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called_with_arguments_that_satisfy_their_schema(client, stream):
    asked = {"tools": [WEATHER, TIME], "tool_choice": "required", "max_output_tokens": 200, "stream": stream}
    response = ask(client, "What is the weather in Paris, in C?", **asked)
    if stream:
        response, items = collected(response)
        assert [item.to_dict() for item in response.output] == items
    calls = response.output
    assert response.status == "completed" and calls and all(call.type == "function_call" for call in calls)
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), WEATHER["parameters"])
    assert len({call.call_id for call in calls}) == len({call.id for call in calls}) == len(calls)


def test_a_named_tool_is_the_one_that_is_called(client):
    choice = {"type": "function", "name": "get_time"}
    response = ask(
        client,
        "The weather?",
        tools=[WEATHER, TIME],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_output_tokens=99,
    )
    assert [call.name for call in response.output] == ["get_time"]


@pytest.mark.parametrize("stored", [True, False])
def test_the_result_of_a_tool_goes_back_and_is_answered(client, stored):
    question = "What is the weather in Paris, in C?"
    first = ask(
        client, question, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_output_tokens=99
    )
    (call,) = first.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny, 21 degrees"}
    if stored:
        second = ask(client, [result], previous_response_id=first.id, tools=[WEATHER], tool_choice="none")
    else:
        items = [{"role": "user", "content": question}, call.to_dict(), result]
        second = ask(client, items, tools=[WEATHER], tool_choice="none")
    assert second.output[0].type == "message" and second.output_text
    known = first.usage.input_tokens + first.usage.output_tokens
    assert second.usage.input_tokens_details.cached_tokens >= known - PAGE - 1


def test_structured_output_is_parsed(client):
    response = client.responses.parse(
        model=MODEL, input="Is Paris in France?", text_format=Verdict, temperature=0, max_output_tokens=64
    )
    assert isinstance(response.output_parsed, Verdict)


def test_structured_output_goes_together_with_tools(client):
    form = {"type": "json_schema", "name": "verdict", "schema": Verdict.model_json_schema(), "strict": False}
    for seed in range(3):
        response = ask(
            client,
            "Is it sunny in Rome?",
            tools=[WEATHER],
            text={"format": form},
            temperature=1,
            extra_body={"seed": seed},
            max_output_tokens=300,
        )
        assert response.status == "completed"
        for item in response.output:
            if item.type == "function_call":
                jsonschema.validate(json.loads(item.arguments), WEATHER["parameters"])
            else:
                Verdict.model_validate_json(item.content[0].text)


def test_any_json_object_can_be_asked_for(client):
    response = ask(client, "A JSON object of one key.", text={"format": {"type": "json_object"}}, max_output_tokens=200)
    if response.status == "completed":
        assert isinstance(json.loads(response.output_text), dict)
    assert response.output_text.startswith("{")


def test_a_response_goes_on_from_an_earlier_one_as_if_all_had_been_sent(client):
    first = ask(client, "My name is Ada. Say hello.")
    items = [{"role": "user", "content": "My name is Ada. Say hello."}, first.output[0].to_dict()]
    question = {"role": "user", "content": "What is my name?"}
    second = ask(client, [question], previous_response_id=first.id)
    sent = ask(client, [*items, question])
    assert second.previous_response_id == first.id
    assert second.output_text == sent.output_text
    assert second.usage.input_tokens == sent.usage.input_tokens
    third = ask(client, [question], previous_response_id=second.id)
    again = ask(client, [*items, question, second.output[0].to_dict(), question])
    assert third.output_text == again.output_text


def test_a_response_that_goes_on_belongs_to_the_same_program_and_finds_its_kv(client):
    create = client.responses.with_raw_response.create
    asked = {"model": MODEL, "temperature": 0, "max_output_tokens": 24}
    first = create(input="Tell me about Rome.", **asked)
    for _ in range(2):
        second = create(input="And Paris?", previous_response_id=first.parse().id, **asked)
        assert second.headers["x-treadle-program-id"] == first.headers["x-treadle-program-id"]
        known = first.parse().usage.input_tokens + first.parse().usage.output_tokens
        assert second.parse().usage.input_tokens_details.cached_tokens >= known - PAGE - 1


def test_instructions_are_not_carried_over(client):
    first = ask(client, "Hello", instructions="Be brief. " * 20)
    second = ask(client, "Hello", previous_response_id=first.id)
    assert second.instructions is None and second.usage.input_tokens < first.usage.input_tokens + 60


def test_a_stored_response_can_be_read_and_forgotten(client):
    made = ask(client)
    assert client.responses.retrieve(made.id).to_dict() == made.to_dict()
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, previous_response_id=made.id)
    assert caught.value.code == "previous_response_not_found" and caught.value.param == "previous_response_id"


def test_what_shall_not_be_stored_is_not(client):
    made = ask(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_a_streamed_response_is_stored_when_its_last_event_arrives(client):
    final, _ = collected(ask(client, stream=True))
    assert client.responses.retrieve(final.id).to_dict() == final.to_dict()


def test_an_item_can_be_named_instead_of_sent(client):
    made = ask(client)
    items = [
        {"role": "user", "content": "What is the capital of France?"},
        {"type": "item_reference", "id": made.output[0].id},
        {"role": "user", "content": "And where is it?"},
    ]
    sent = [items[0], made.output[0].to_dict(), items[2]]
    assert ask(client, items).output_text == ask(client, sent).output_text
    items[1]["id"] = "msg_of_nobody"
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, items)
    assert caught.value.param == "input[1].id"


def test_logprobs_are_included_if_they_are_asked_for(client):
    response = ask(client, include=["message.output_text.logprobs"], top_logprobs=3, max_output_tokens=5)
    entries = response.output[0].content[0].logprobs
    assert len(entries) == 5 and all(len(entry.top_logprobs) == 3 for entry in entries)
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == response.output_text
    assert ask(client, max_output_tokens=5).output[0].content[0].logprobs == []


def test_a_response_whose_program_is_ended_has_failed(client):
    numbers = {"type": "array", "items": {"type": "integer"}, "minItems": 400}
    form = {"type": "json_schema", "name": "numbers", "schema": numbers}
    doomed = {"x-treadle-program-id": "doomed"}
    events = []
    for event in ask(client, text={"format": form}, max_output_tokens=2000, stream=True, extra_headers=doomed):
        events.append(event)
        is_text = event.type == "response.output_text.delta"
        if is_text and [each.type for each in events].count(event.type) == 3:
            client.delete("/programs/doomed", cast_to=object)
    final, items = collected(events)
    assert events[-1].type == "response.failed" and final.status == "failed"
    assert final.error.code == "program_ended"
    assert [item.to_dict() for item in final.output] == items and items[0]["status"] == "incomplete"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(final.id)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": ""}]}, "input"),
        ({"max_output_tokens": 10**9}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "wrong"}}}}, "text.format.schema"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "wrong"}}]}, "tools[0].parameters"),
        ({"input": "word " * 20_000}, "input"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": MODEL, "input": "Hi", **fields})
    assert caught.value.param == param and caught.value.type == "invalid_request_error"


def test_a_model_that_is_not_served_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="gpt-5", input="Hi")
    assert caught.value.code == "model_not_found"
