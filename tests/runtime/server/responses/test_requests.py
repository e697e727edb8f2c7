"""A request is read strictly, what cannot be honoured is refused by its name, and the rest becomes a turn."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from treadle.runtime.server.errors import ApiError
from treadle.runtime.server.requests import validated
from treadle.runtime.server.responses.asked import repeated, turn_of
from treadle.runtime.server.responses.messages import messages_of
from treadle.runtime.server.responses.requests import ResponseRequest

ADD = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
SUB = {**ADD, "name": "sub"}
SERVER = SimpleNamespace(
    engine=SimpleNamespace(vocab_size=100, max_context=64),
    text_model=lambda: (SimpleNamespace(eos_token_ids=(2,)), None),
)


def read(**fields):
    return validated({"model": "m", "input": "Hi", **fields}, ResponseRequest)


def turn(**fields):
    request = read(**fields)
    return turn_of(SERVER, request, [])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"conversation": {"id": "conv_1"}}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"tools": [ADD, {"type": "web_search"}]}, "tools[1].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"include": ["everything"]}, "include[0]"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 1.5}, "max_output_tokens"),
        ({"max_output_tokens": True}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "robot", "content": ""}]}, "input[0].role"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": ""}]}]}, "input[0].content[0]"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(fields, param):
    with pytest.raises(ApiError) as caught:
        read(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    "fields",
    [
        {"background": False},
        {"conversation": None},
        {"truncation": "disabled"},
        {"reasoning": {"effort": "none"}},
        {"reasoning": {"effort": None}},
        {"text": {"format": {"type": "text"}, "verbosity": None}},
        {"a_field_of_tomorrow": {"x": [1]}},
        {"include": ["reasoning.encrypted_content"]},
    ],
)
def test_what_says_nothing_is_accepted(fields):
    read(**fields)


@pytest.mark.parametrize(
    ("choice", "mode", "callable_tools"),
    [
        (None, "auto", None),
        ("auto", "auto", None),
        ("none", "none", None),
        ("required", "required", None),
        ({"type": "function", "name": "sub"}, "required", ("sub",)),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "add"}]}, "auto", ("add",)),
    ],
)
def test_tool_choice_says_which_tools_may_or_must_be_called(choice, mode, callable_tools):
    asked = turn(tools=[ADD, SUB], tool_choice=choice)
    assert [tool.name for tool in asked.tools] == ["add", "sub"]
    assert (asked.tool_mode, asked.callable_tools) == (mode, callable_tools)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "name": "sub"}}, "tool_choice.name"),
        (
            {
                "tools": [ADD],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "add"}, {"type": "function", "name": "sub"}],
                },
            },
            "tool_choice.tools[1].name",
        ),
    ],
)
def test_a_choice_of_tools_that_are_not_there_is_refused(fields, param):
    with pytest.raises(ApiError) as caught:
        turn(**fields)
    assert caught.value.param == param


def test_a_schema_for_the_text_goes_together_with_tools():
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "string"}}}
    asked = turn(tools=[ADD], text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}})
    assert json.loads(asked.answer.schema) == schema and asked.answer.strict
    assert list(json.loads(asked.answer.schema)["properties"]) == ["b", "a"]
    assert asked.tools[0].name == "add"


def test_a_response_repeats_what_was_asked_for():
    body = repeated(read(tools=[ADD], metadata={"k": "v"}, temperature=0.0, max_output_tokens=7))
    assert body["tools"][0]["name"] == "add" and body["metadata"] == {"k": "v"}
    assert body["temperature"] == 0.0 and body["max_output_tokens"] == 7 and body["top_p"] == 1.0


CALL_A = {"type": "function_call", "call_id": "a", "name": "add", "arguments": "{}"}
CALL_B = {"type": "function_call", "call_id": "b", "name": "add", "arguments": "{}"}


def said(role, content, **extra):
    return {"type": "message", "role": role, "content": content, **extra}


def test_items_of_one_turn_become_one_message():
    messages = messages_of(
        [
            said("user", [{"type": "input_text", "text": "Add "}, {"type": "input_text", "text": "them"}]),
            said("assistant", [{"type": "output_text", "text": "Yes."}]),
            CALL_A,
            CALL_B,
            {"type": "function_call_output", "call_id": "a", "output": "1"},
            {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "2"}]},
            said("assistant", "3"),
        ],
        "Be brief.",
    )
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert messages[1]["content"] == "Add them"
    assert messages[2]["content"] == "Yes."
    assert [call["id"] for call in messages[2]["tool_calls"]] == ["a", "b"]
    assert [message["content"] for message in messages[3:]] == ["1", "2", "3"]


def test_what_is_said_after_a_call_belongs_to_the_same_turn():
    (message,) = messages_of([said("assistant", "One. "), CALL_A, said("assistant", "Two.")])
    assert message["content"] == "One. Two." and len(message["tool_calls"]) == 1


def test_an_output_that_belongs_to_no_call_is_refused():
    with pytest.raises(ApiError) as caught:
        messages_of([CALL_A, {"type": "function_call_output", "call_id": "b", "output": ""}])
    assert caught.value.param == "input" and "'b'" in caught.value.message
