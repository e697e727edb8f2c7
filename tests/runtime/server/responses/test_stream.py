"""A turn's events become items, and items become the event sequence of the Responses API."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from treadle.runtime.server.errors import ApiError
from treadle.runtime.server.responses.response import Response
from treadle.runtime.server.responses.stream import ResponseStream
from treadle.runtime.server.turn import TextDelta, ToolCallArguments, ToolCallStarted, TurnFinished, TurnUsage

USAGE = TurnUsage(prompt=10, cached=4, completion=6)
ASKED = {"model": "m", "tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
OFFICIAL = TypeAdapter(ResponseStreamEvent)


def turn(*parts, reason="stop"):
    """Events of a turn: a piece of text is a string, a call is its id, its name and pieces of its arguments."""
    events, calls = [], 0
    for part in parts:
        if isinstance(part, str):
            events.append(TextDelta(0, part))
            continue
        call_id, name, *pieces = part
        events.append(ToolCallStarted(0, calls, call_id, name))
        events += [ToolCallArguments(0, calls, piece) for piece in pieces]
        calls += 1
    return [*events, TurnFinished(0, reason, USAGE)]


def streamed(events):
    response = Response(ASKED, lambda logprobs: [{"token": str(each)} for each in logprobs])
    stream = ResponseStream(response)
    sent = list(stream.begin())
    for event in events:
        sent += stream.take(event)
    return sent, response.to_json()


def kinds(sent):
    return [event["type"].removeprefix("response.") for event in sent]


def rebuilt(sent):
    """The output as a client builds it from `added` items and deltas alone."""
    items = {}
    for event in sent:
        match event["type"]:
            case "response.output_item.added":
                assert event["output_index"] == len(items)
                items[event["output_index"]] = dict(event["item"])
            case "response.content_part.added":
                items[event["output_index"]]["content"] = [dict(event["part"])]
            case "response.output_text.delta":
                assert items[event["output_index"]]["id"] == event["item_id"]
                items[event["output_index"]]["content"][0]["text"] += event["delta"]
            case "response.function_call_arguments.delta":
                assert items[event["output_index"]]["id"] == event["item_id"]
                items[event["output_index"]]["arguments"] += event["delta"]
            case "response.output_item.done":
                items[event["output_index"]]["status"] = event["item"]["status"]
                assert items[event["output_index"]] == event["item"]
    return [items[index] for index in sorted(items)]


def test_text_is_one_message_in_the_order_that_clients_expect():
    sent, final = streamed(turn("Hel", "lo"))
    assert kinds(sent) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert sent[0]["response"]["status"] == "in_progress" and sent[0]["response"]["output"] == []
    assert sent[2]["item"]["content"] == [] and sent[3]["part"]["text"] == ""
    assert final["output"][0]["content"][0]["text"] == "Hello"
    assert sent[-1]["response"] == final


def test_calls_come_one_after_the_other_with_their_call_ids():
    sent, final = streamed(turn(("call_a", "add", '{"x"', ":1}"), ("call_b", "sub", "{}"), reason="tool_calls"))
    assert kinds(sent)[2:-1] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert [(item["call_id"], item["name"], item["arguments"]) for item in final["output"]] == [
        ("call_a", "add", '{"x":1}'),
        ("call_b", "sub", "{}"),
    ]
    assert final["status"] == "completed"


def test_a_turn_that_reached_its_limit_is_incomplete_and_so_is_its_last_item():
    sent, final = streamed(turn("Let me", ("call_a", "add", '{"x'), reason="length"))
    assert kinds(sent)[-1] == "incomplete"
    assert final["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in final["output"]] == ["completed", "incomplete"]


def test_a_turn_without_a_word_is_an_empty_message():
    _, final = streamed(turn())
    assert [item["type"] for item in final["output"]] == ["message"]
    assert final["output"][0]["content"][0]["text"] == ""


def test_a_failure_closes_what_is_open_and_ends_the_stream():
    response = Response(ASKED)
    stream = ResponseStream(response)
    sent = [
        *stream.begin(),
        *stream.take(TextDelta(0, "half")),
        *stream.fail(ApiError(500, "the engine failed", type="server_error")),
    ]
    assert kinds(sent)[-3:] == ["content_part.done", "output_item.done", "failed"]
    assert sent[-1]["response"]["error"] == {"code": "server_error", "message": "the engine failed"}
    assert sent[-1]["response"]["output"][0]["content"][0]["text"] == "half"


def test_usage_tells_what_was_cached():
    _, final = streamed(turn("x"))
    assert final["usage"]["input_tokens"] == 10 and final["usage"]["input_tokens_details"]["cached_tokens"] == 4
    assert final["usage"]["total_tokens"] == 16


def test_logprobs_are_in_the_delta_and_in_the_message():
    sent, final = streamed([TextDelta(0, "a", (1, 2)), TextDelta(0, "b", (3,)), TurnFinished(0, "stop", USAGE)])
    deltas = [event["logprobs"] for event in sent if event["type"] == "response.output_text.delta"]
    assert deltas == [[{"token": "1"}, {"token": "2"}], [{"token": "3"}]]
    assert final["output"][0]["content"][0]["logprobs"] == [*deltas[0], *deltas[1]]


text = st.text(min_size=1, max_size=5)
call = st.tuples(st.uuids().map(str), st.sampled_from(["add", "sub"]), text, text)


@given(st.lists(text | call, max_size=6), st.sampled_from(["stop", "length", "tool_calls"]))
def test_what_a_client_builds_from_deltas_is_the_final_object(parts, reason):
    sent, final = streamed(turn(*parts, reason=reason))
    assert [event["sequence_number"] for event in sent] == list(range(len(sent)))
    assert sent[-1]["response"] == final
    built = rebuilt(sent)
    if parts:
        assert built == final["output"]
    ids = [item["id"] for item in final["output"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_the_official_client_can_read_every_event(reason):
    sent, final = streamed(turn("Hi", ("call_a", "add", "{}"), "there", reason=reason))
    for event in sent:
        assert OFFICIAL.validate_python(event).type == event["type"]
    assert OpenAIResponse.model_validate(final).output_text == "Hithere"
