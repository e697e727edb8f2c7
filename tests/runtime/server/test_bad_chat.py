"""What the chat and completions endpoints refuse: with which status, and naming which field."""

from __future__ import annotations

import json

import httpx
import pytest

MESSAGES = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
INVALID = "invalid_request_error"


def function(**fields):
    return {"type": "function", "function": {"name": "add", **fields}}


def said(**message):
    return {"messages": [message]}


REFUSED = [
    ({"model": None}, 400, "model"),
    ({"model": 3}, 400, "model"),
    ({"model": "gpt-5"}, 404, "model"),
    ({"messages": None}, 400, "messages"),
    ({"messages": []}, 400, "messages"),
    ({"messages": "Hello"}, 400, "messages"),
    ({"messages": [None]}, 400, "messages[0]"),
    ({"messages": [{}]}, 400, "messages[0]"),
    (said(role="robot", content="x"), 400, "messages[0]"),
    (said(role="function", name="f", content="x"), 400, "messages[0]"),
    (said(role="user"), 400, "messages[0].content"),
    (said(role="user", content=None), 400, "messages[0].content"),
    (said(role="user", content=5), 400, "messages[0].content"),
    (said(role="user", content=[{"type": "text"}]), 400, "messages[0].content[0].text"),
    (
        said(role="user", content=[{"type": "image_url", "image_url": {"url": "x"}}]),
        400,
        "messages[0].content[0].image_url",
    ),
    (said(role="user", content=[{"type": "input_audio"}]), 400, "messages[0].content[0].type"),
    (said(role="user", content=[{"type": "file", "file": {}}]), 400, "messages[0].content[0].file"),
    (said(role="user", content=[{"type": "poem"}]), 400, "messages[0].content[0]"),
    (said(role="tool", content="x"), 400, "messages[0].tool_call_id"),
    (said(role="assistant", tool_calls=[{"id": "a"}]), 400, "messages[0].tool_calls[0].function"),
    (
        said(role="assistant", content="x", function_call={"name": "f", "arguments": ""}),
        400,
        "messages[0].function_call",
    ),
    (said(role="assistant", content="x", audio={"id": "a"}), 400, "messages[0].audio"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": 2.1}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"temperature": "1"}, 400, "temperature"),
    ({"top_p": 1.5}, 400, "top_p"),
    ({"top_k": 1.5}, 400, "top_k"),
    ({"min_p": -0.1}, 400, "min_p"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"presence_penalty": 3}, 400, "presence_penalty"),
    ({"frequency_penalty": -3}, 400, "frequency_penalty"),
    ({"logit_bias": {"5": 200}}, 400, "logit_bias.5"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    ({"logit_bias": [1]}, 400, "logit_bias"),
    ({"seed": 1.5}, 400, "seed"),
    ({"seed": True}, 400, "seed"),
    ({"stop": ""}, 400, "stop"),
    ({"stop": ["a"] * 17}, 400, "stop"),
    ({"stop": ["a", ""]}, 400, "stop[1]"),
    ({"stop": "x" * 300}, 400, "stop"),
    ({"n": 0}, 400, "n"),
    ({"n": 17}, 400, "n"),
    ({"n": 2**62}, 400, "n"),
    ({"n": True}, 400, "n"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 2**62}, 400, "max_tokens"),
    ({"max_completion_tokens": 1.5}, 400, "max_completion_tokens"),
    ({"max_completion_tokens": 0}, 400, "max_completion_tokens"),
    ({"stream": "yes"}, 400, "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage"),
    ({"top_logprobs": 3}, 400, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"logprobs": 3}, 400, "logprobs"),
    ({"tools": [{}]}, 400, "tools[0].type"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, 400, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, 400, "tools[0].function"),
    ({"tools": [function(name="")]}, 400, "tools[0].function.name"),
    ({"tools": [function(name="a b")]}, 400, "tools[0].function.name"),
    ({"tools": [TOOL, TOOL]}, 400, "tools[1].function.name"),
    ({"tools": [function(parameters=[])]}, 400, "tools[0].function.parameters"),
    ({"tools": [TOOL, function(name="b", parameters={"type": "banana"})]}, 400, "tools[1].function.parameters"),
    (
        {"tools": [function(strict=True, parameters={"type": "object", "not": {"required": ["a"]}})]},
        400,
        "tools[0].function.parameters",
    ),
    ({"tools": [function(name=f"f{i}") for i in range(300)]}, 400, "tools"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"tool_choice": "perhaps", "tools": [TOOL]}, 400, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "b"}}, "tools": [TOOL]}, 400, "tool_choice"),
    ({"tool_choice": {"type": "custom", "custom": {"name": "b"}}, "tools": [TOOL]}, 400, "tool_choice"),
    (
        {
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
            "tools": [TOOL],
        },
        400,
        "tool_choice.allowed_tools.tools",
    ),
    ({"parallel_tool_calls": "no"}, 400, "parallel_tool_calls"),
    ({"response_format": {"type": "xml"}}, 400, "response_format"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        400,
        "response_format.json_schema.schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "banana"}}}},
        400,
        "response_format",
    ),
    (
        {
            "tools": [TOOL],
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "banana"}}},
        },
        400,
        "response_format",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "strict": True, "schema": {"not": {"type": "null"}}},
            }
        },
        400,
        "response_format",
    ),
    ({"metadata": {"a": 1}}, 400, "metadata.a"),
    ({"metadata": {str(i): "x" for i in range(17)}}, 400, "metadata"),
    ({"metadata": {"a": "x" * 513}}, 400, "metadata.a"),
    ({"service_tier": "first"}, 400, "service_tier"),
    ({"user": 5}, 400, "user"),
    ({"prompt_cache_key": 5}, 400, "prompt_cache_key"),
    ({"reasoning_effort": "high"}, 400, "reasoning_effort"),
    ({"verbosity": "low"}, 400, "verbosity"),
    ({"modalities": ["text", "audio"]}, 400, "modalities"),
    ({"audio": {"voice": "x", "format": "wav"}}, 400, "audio"),
    ({"prediction": {"type": "content", "content": "x"}}, 400, "prediction"),
    ({"moderation": {"model": "m"}}, 400, "moderation"),
    ({"web_search_options": {}}, 400, "web_search_options"),
    ({"functions": [{"name": "f"}]}, 400, "functions"),
    ({"function_call": "auto"}, 400, "function_call"),
    ({"store": True}, 400, "store"),
    (said(role="user", content="word " * 3000), 400, "messages"),
]
ACCEPTED = [
    {"tools": []},
    {"tools": None, "tool_choice": "none"},
    {"tool_choice": "auto"},
    {"stop": []},
    {"stop": None, "seed": None, "n": None, "temperature": None, "max_tokens": None, "stream": None},
    {"logit_bias": {}},
    {"metadata": {"a": "b"}, "user": "me", "prompt_cache_key": "k", "safety_identifier": "s", "service_tier": "flex"},
    {"prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": 60}},
    {"store": False, "modalities": ["text"], "reasoning_effort": "none", "functions": None},
    {"an_unknown_field": {"of": ["any", "kind"]}, "top_k": -1},
    {"response_format": {"type": "text"}},
    {"max_tokens": 2048},
    said(role="developer", content="Be brief."),
    said(role="user", content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], name="ann"),
    {"messages": [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": []}]},
    {
        "messages": [
            *MESSAGES,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "4"}]},
        ]
    },
]


def post(http, fields, path="/v1/chat/completions"):
    body = {"model": "smollm2", "messages": MESSAGES, "max_completion_tokens": 1, **fields}
    return http.post(path, json={key: value for key, value in body.items() if key != "messages" or value is not None})


def name_of(fields):
    return json.dumps(fields)[:70]


@pytest.mark.parametrize(("fields", "status", "param"), REFUSED, ids=[name_of(fields) for fields, *_ in REFUSED])
def test_a_field_that_cannot_be_is_refused_by_its_name(http, fields, status, param):
    answer = post(http, fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert error["type"] == ("not_found_error" if status == 404 else INVALID)
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) > 10


@pytest.mark.parametrize("fields", ACCEPTED, ids=name_of)
def test_what_clients_send_beside_is_accepted(http, fields):
    answer = post(http, fields)
    assert answer.status_code == 200, answer.text


COMPLETIONS = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt[1]"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a"] * 5000}, "prompt"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 3}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": 1, "echo": True}, "logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"n": 100}, "n"),
    ({"echo": 1}, "echo"),
]


@pytest.mark.parametrize(("fields", "param"), COMPLETIONS, ids=[name_of(fields) for fields, _ in COMPLETIONS])
def test_completions_refuse_by_name_too(http, fields, param):
    answer = http.post("/v1/completions", json={"model": "smollm2", "prompt": "Hello", "max_tokens": 1, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b'{"model": NaN}', b'{"a": 1, "a": 2}', b"\xff\xfe", b"[" * 5000, b'{"n": 1e999}']
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
def test_a_body_that_is_no_json_object_is_refused(http, body, path):
    answer = http.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == INVALID


def test_a_prompt_beyond_the_context_has_the_code_that_clients_know(http):
    error = post(http, said(role="user", content="word " * 3000)).json()["error"]
    assert error["code"] == "context_length_exceeded"


def test_messages_beyond_the_limit_are_refused_before_they_become_tokens(serve):
    with serve(max_messages=3, max_prompt_characters=100) as server:
        many = post(httpx.Client(base_url=server.url), {"messages": MESSAGES * 4})
        long = post(httpx.Client(base_url=server.url), said(role="user", content="x" * 101))
    assert many.json()["error"]["code"] == "too_many_messages"
    assert long.json()["error"]["code"] == "prompt_too_long"
