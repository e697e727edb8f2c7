"""Streams as they are on the wire, and what becomes of the calls whose readers go away."""

from __future__ import annotations

import json
import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest

MESSAGES = [{"role": "user", "content": "Hello"}]
LONG = {"model": "smollm2", "messages": MESSAGES, "max_completion_tokens": 2000, "ignore": 1}
NO_END = {"logit_bias": {"2": -100, "0": -100}}
"""Without the tokens that end a turn, an answer is as long as it may be."""


def eventually(check, patience=20.0):
    deadline = time.monotonic() + patience
    while not check():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.02)


def events_of(response):
    """The events of a stream, strictly: a line `data: ...`, an empty line, and so on; comments apart."""
    lines = [line for line in response.iter_lines() if not line.startswith(":")]
    while lines and not lines[0]:
        lines.pop(0)
    assert all(not line for line in lines[1::2]) and len(lines) % 2 == 0
    assert all(line.startswith("data: ") for line in lines[::2])
    return [line.removeprefix("data: ") for line in lines[::2]]


def raw_request(url, body, path="/v1/chat/completions"):
    """A connection that has sent a request, and reads nothing yet."""
    place = urlsplit(url)
    connection = socket.create_connection((place.hostname, place.port))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def test_a_stream_is_made_of_events_with_the_role_first_and_done_last(http):
    body = {"model": "smollm2", "messages": MESSAGES, "max_completion_tokens": 4, "stream": True, **NO_END}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-request-id"] and response.headers["x-treadle-program-id"]
        *events, last = events_of(response)
    assert last == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert len({chunk["id"] for chunk in chunks}) == 1
    first, *middle, end = [chunk["choices"][0] for chunk in chunks]
    assert first["delta"]["role"] == "assistant" and first["delta"]["content"] == ""
    assert all(set(choice["delta"]) == {"content"} and choice["finish_reason"] is None for choice in middle)
    assert end["delta"] == {} and end["finish_reason"] == "length"
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_comes_in_a_last_chunk_without_choices(http):
    body = {"model": "smollm2", "messages": MESSAGES, "max_completion_tokens": 3, "stream": True, **NO_END}
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream_options": {"include_usage": True}}) as got:
        *events, usage, _ = events_of(got)
    assert all(json.loads(event)["usage"] is None for event in events)
    assert json.loads(usage)["choices"] == [] and json.loads(usage)["usage"]["completion_tokens"] == 3


def test_the_same_seed_gives_the_same_text_streamed_or_not(http):
    body = {"model": "smollm2", "messages": MESSAGES, "max_completion_tokens": 12, "seed": 11, "temperature": 1.3}
    texts = {http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] for _ in range(2)}
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        chunks = [json.loads(event) for event in events_of(response)[:-1]]
    texts.add("".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks))
    assert len(texts) == 1
    other = http.post("/v1/chat/completions", json={**body, "seed": 12}).json()["choices"][0]["message"]["content"]
    assert other not in texts


def test_a_stop_string_ends_the_answer_before_it(http):
    body = {"model": "smollm2", "messages": MESSAGES, "max_completion_tokens": 40, "seed": 3, **NO_END}
    text = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    stop = text[10:14]
    choice = http.post("/v1/chat/completions", json={**body, "stop": [stop, "no such text"]}).json()["choices"][0]
    assert choice["message"]["content"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"


def test_a_logit_bias_chooses_the_token(http):
    body = {"model": "smollm2", "messages": MESSAGES, "max_completion_tokens": 3, "logit_bias": {"1000": 100}}
    answer = http.post("/v1/completions", json={**body, "prompt": "a", "max_tokens": 3, "return_token_ids": True})
    assert answer.json()["choices"][0]["token_ids"] == [1000] * 3


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "waiting"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_goes_away_frees_its_calls(serve, stream, n):
    with serve() as server:
        connection = raw_request(server.url, {**LONG, **NO_END, "stream": stream, "n": n})
        eventually(lambda: server.engine.scheduler.num_running == n)
        connection.close()
        eventually(server.is_idle)
        assert len(server.server.programs) == 1, "the program is still there: its client may come back"


def test_a_client_that_does_not_read_is_cut_off(serve):
    with serve(stall_timeout_s=0.5, max_choices=16) as server:
        connection = raw_request(
            server.url, {**LONG, **NO_END, "stream": True, "n": 16, "logprobs": True, "top_logprobs": 20}
        )
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        eventually(lambda: server.engine.scheduler.num_running == 16)
        eventually(server.is_idle, 60)
        connection.close()
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_silence_is_filled_with_comments(serve):
    with serve(engine={"max_step_tokens": 8}, ping_interval_s=0.05) as server:
        long = [{"role": "user", "content": "word " * 1500}]
        body = {"model": "smollm2", "messages": long, "max_completion_tokens": 2, "stream": True}
        with httpx.stream("POST", f"{server.v1}/chat/completions", json=body, timeout=60) as response:
            text = response.read().decode()
    assert ": ping\n\n" in text and text.endswith("data: [DONE]\n\n")


def test_what_fails_within_a_stream_is_told_in_the_stream(serve):
    with serve() as server, httpx.Client(base_url=server.url, timeout=30) as http:
        body = {**LONG, **NO_END, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            program_id = response.headers["x-treadle-program-id"]
            lines = response.iter_lines()
            while "content" not in next(lines):
                pass
            assert http.delete(f"/v1/programs/{program_id}").status_code == 200
            *_, last = (line for line in lines if line)
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "program_ended"


def test_draining_lets_requests_finish_and_takes_no_more(serve):
    with serve(drain_timeout_s=30) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        body = {**LONG, **NO_END, "max_completion_tokens": 300, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            drained = server.drain()
            eventually(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
            refused = httpx.post(f"{server.v1}/chat/completions", json={**body, "stream": False})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
            assert int(refused.headers["retry-after"]) > 0
            assert httpx.get(f"{server.url}/livez").status_code == 200
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert drained.result(30) is True


def test_draining_does_not_wait_for_ever(serve):
    with serve(drain_timeout_s=0.2) as server:
        connection = raw_request(server.url, {**LONG, **NO_END, "stream": True})
        eventually(lambda: server.server.admission.num_requests == 1)
        assert server.drain().result(10) is False
        connection.close()
