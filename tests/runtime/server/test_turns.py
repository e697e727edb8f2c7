"""A turn that does not come to its end: what was generated is charged, and what went wrong is known."""

from __future__ import annotations

import time

import httpx
import pytest

from treadle.grammar import ToolSpec
from treadle.runtime.server import turn
from treadle.runtime.server.tenants import key_digest, new_key
from treadle.runtime.server.turn import TurnRequest

PROMPT = list(range(3, 23))


@pytest.fixture
def opened(serve):
    """A server, and a client of it."""
    with serve() as server, httpx.Client(base_url=server.v1, timeout=60) as http:
        yield server, http


def begun(http, program="p", **body):
    """A stream that has brought its first text."""
    body = {"model": "treadle", "prompt": PROMPT, "max_tokens": 1500, "temperature": 0, "stream": True, **body}
    return http.stream("POST", "/completions", json=body, headers={"x-treadle-program-id": program})


def until_text(stream):
    lines = stream.iter_lines()
    next(line for line in lines if line.startswith("data: "))
    return lines


def test_who_leaves_early_has_used_tokens_too(serve, tmp_path):
    key, file = new_key(), tmp_path / "keys.toml"
    file.write_text(f'[[tenants]]\nname = "a"\nkeys = ["{key_digest(key)}"]\nmax_tokens_per_minute = 100\n')
    headers = {"authorization": f"Bearer {key}"}
    with serve(keys=str(file)) as server, httpx.Client(base_url=server.v1, timeout=60, headers=headers) as http:
        for _ in range(10):
            with begun(http) as stream:
                if stream.status_code == 429:
                    break
                until_text(stream)
        assert stream.status_code == 429 and int(stream.headers["retry-after"]) >= 1
        assert "treadle_generated_tokens_total 0.0" not in server.server.metrics.render().decode()


def test_a_stream_that_failed_is_told_to_the_tracer_and_the_end_to_watchers(opened):
    server, http = opened
    facts, told = [], []
    server.server.tracing.turn_ended = lambda turn, period: facts.append(turn)
    server.server.programs.watchers.append(lambda tenant, kind, data: told.append((kind, data)))
    http.post("/programs", json={"id": "p", "kind": "coder"}).raise_for_status()
    with begun(http) as stream:
        lines = until_text(stream)
        http.delete("/programs/p").raise_for_status()
        assert "program_ended" in "".join(lines)
    end = time.monotonic() + 20
    while not facts:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert [each.error for each in facts] == ["ApiError"] and facts[0].generated_tokens > 0
    assert [data["kind"] for kind, data in told if kind == "program.ended"] == ["coder"]


def test_a_program_that_ends_while_its_prompt_is_encoded(opened, monkeypatch):
    server, http = opened
    encoded = turn.encoded

    async def slowly(server, request, program):
        await server.programs.end(program)
        return await encoded(server, request, program)

    monkeypatch.setattr(turn, "encoded", slowly)
    answer = http.post("/completions", json={"model": "treadle", "prompt": PROMPT})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "program_ended")
    assert "program-" not in answer.text
    assert server.is_idle()


@pytest.mark.parametrize(
    "request_",
    [
        TurnRequest(messages=[{"role": "user", "content": "x" * 100}]),
        TurnRequest(
            messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x" * 100}}]}]
        ),
        TurnRequest(messages=[], tools=(ToolSpec("f", "x" * 50, "x" * 50),)),
        TurnRequest(prompt="x" * 100),
    ],
)
def test_all_that_becomes_tokens_is_counted(request_):
    assert request_.num_characters == 100
