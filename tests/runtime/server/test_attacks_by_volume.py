"""What an attacker may put into one large body: a million of whatever is wrong, or dear. Others are served meanwhile.

`docs/security.md` lists these tests by name.
"""

import concurrent.futures
import json
import resource
import time
from functools import partial
from pathlib import Path

import httpx
import pytest
from support.serving import served, tiny_engine

CHAT, COMPLETIONS, RESPONSES, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"
HELLO = '[{"role": "user", "content": "hello"}]'
MILLION = 1_000_000
NULLS = "[" + "null," * (MILLION - 1) + "null]"
TEXTS = "[" + '"",' * (MILLION - 1) + '""]'
EMPTY = "[" + "{}," * (MILLION - 1) + "{}]"
KEYS = "{" + ",".join(f'"k{i}":0' for i in range(500_000)) + "}"
SAME = json.dumps(["reasoning.encrypted_content"] * 200_000)
TOOLS = '[{"type": "function", "function": {"name": "f"}}]'
VOLUMES = {
    "messages of null": (CHAT, f'"messages": {NULLS}'),
    "messages of nothing": (CHAT, f'"messages": {EMPTY}'),
    "parts": (CHAT, f'"messages": [{{"role": "user", "content": {NULLS}}}]'),
    "empty parts": (CHAT, f'"messages": [{{"role": "user", "content": {EMPTY}}}]'),
    "calls": (CHAT, f'"messages": [{{"role": "assistant", "tool_calls": {NULLS}}}]'),
    "tools": (CHAT, f'"messages": {HELLO}, "tools": {NULLS}'),
    "allowed tools": (
        CHAT,
        f'"messages": {HELLO}, "tools": {TOOLS}, "tool_choice": {{"type": "allowed_tools", "allowed_tools": '
        f'{{"mode": "auto", "tools": {EMPTY}}}}}',
    ),
    "modalities": (CHAT, f'"messages": {HELLO}, "modalities": {TEXTS}'),
    "stops": (CHAT, f'"messages": {HELLO}, "stop": {TEXTS}'),
    "biases": (CHAT, f'"messages": {HELLO}, "logit_bias": {KEYS}'),
    "metadata": (CHAT, f'"messages": {HELLO}, "metadata": {KEYS}'),
    "prompt of null": (COMPLETIONS, f'"prompt": {NULLS}'),
    "prompts of null": (COMPLETIONS, f'"prompt": [{NULLS}]'),
    "prompts without text": (COMPLETIONS, f'"prompt": {TEXTS}'),
    "prompt that is wrong at its end": (COMPLETIONS, f'"prompt": [{"1," * MILLION}null]'),
    "prompt of ids": (COMPLETIONS, f'"prompt": [{"1," * 3 * MILLION}1]'),
    "input": (RESPONSES, f'"input": {NULLS}'),
    "input of nothing": (RESPONSES, f'"input": {EMPTY}'),
    "input parts": (RESPONSES, f'"input": [{{"role": "user", "content": {NULLS}}}]'),
    "include": (RESPONSES, f'"input": "x", "include": {NULLS}'),
    "include the same": (RESPONSES, f'"input": "x", "include": {SAME}'),
    "tokens of messages": (TOKENIZE, f'"messages": {NULLS}'),
}
SPARE_BYTES = 600 << 20
"""A body of 8 MiB, its text and its values, and what the machine keeps of them; a million errors are far more."""


@pytest.fixture(scope="module")
def flooded(tokenizer):
    with served(partial(tiny_engine, tokenizer), max_prompt_characters=50_000) as server:
        yield server


@pytest.fixture(scope="module")
def http(flooded):
    with httpx.Client(base_url=flooded.url, timeout=120) as client:
        yield client


def resident_bytes():
    """Of this process, which the server is in."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def refused(answer):
    assert answer.status_code == 400, answer.text[:500]
    assert len(answer.content) < 2000
    return answer.json()["error"]


@pytest.mark.parametrize("name", VOLUMES)
def test_a_body_full_of_faults_holds_nobody_up_and_takes_no_memory(name, flooded, http):
    path, fields = VOLUMES[name]
    body = ('{"model": "treadle", ' + fields + "}").encode()
    assert len(body) < flooded.server.config.max_body_bytes
    before, most, others = resident_bytes(), 0, 0
    with concurrent.futures.ThreadPoolExecutor() as pool, httpx.Client(base_url=flooded.url, timeout=30) as other:
        flood = pool.submit(http.post, path, content=body)
        while not flood.done():
            others += other.get("/health").status_code == 200
            most = max(most, resident_bytes())
    error = refused(flood.result())
    assert others and most - before < SPARE_BYTES
    assert error["param"] is None or error["param"].split("[")[0].split(".")[0] in fields


LONG = "word " * 12_000
FUNCTION = {"name": "f", "description": LONG}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": json.dumps({"x": LONG})}}
ANSWERED = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "x"},
]
HALF = LONG[: len(LONG) // 2]
PROMPTS = {
    "a tool": (CHAT, {"messages": json.loads(HELLO), "tools": [{"type": "function", "function": FUNCTION}]}),
    "arguments": (CHAT, {"messages": ANSWERED}),
    "a message and a tool": (
        CHAT,
        {
            "messages": [{"role": "user", "content": HALF}],
            "tools": [{"type": "function", "function": {**FUNCTION, "description": HALF}}],
        },
    ),
    "instructions": (RESPONSES, {"input": "hello", "instructions": LONG}),
    "a tool of a response": (RESPONSES, {"input": "hello", "tools": [{"type": "function", **FUNCTION}]}),
    "a tool to tokenize": (
        TOKENIZE,
        {"messages": json.loads(HELLO), "tools": [{"type": "function", "function": FUNCTION}]},
    ),
    "arguments to tokenize": (TOKENIZE, {"messages": ANSWERED}),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_every_part_of_a_prompt_counts(name, http):
    path, fields = PROMPTS[name]
    assert refused(http.post(path, json={"model": "treadle", **fields}))["code"] == "prompt_too_long"


def test_long_text_is_tokenized_while_others_are_served(flooded, http):
    text = "word " * 9_990
    with concurrent.futures.ThreadPoolExecutor() as pool, httpx.Client(base_url=flooded.url, timeout=30) as other:
        slow = [pool.submit(http.post, TOKENIZE, json={"prompt": text}) for _ in range(4)]
        others = 0
        while not all(each.done() for each in slow):
            others += other.get("/health").status_code == 200
            time.sleep(0.001)
    assert others and all(each.result().json()["count"] > 9_000 for each in slow)
