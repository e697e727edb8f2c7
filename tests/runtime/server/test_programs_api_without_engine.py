"""What the Programs API says while the engine does not answer, and what it never says."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from treadle.runtime.server import programs_api

CHAT = {"model": "treadle", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture
def opened(serve):
    """A server, and a client of it."""
    with serve() as server, httpx.Client(base_url=server.v1, timeout=20) as http:
        yield server, http


def test_what_the_server_knows_is_told_without_the_engine(opened, monkeypatch):
    server, http = opened
    http.post("/chat/completions", json=CHAT, headers={"x-treadle-program-id": "p"}).raise_for_status()

    async def never(*subject):
        await asyncio.Event().wait()

    monkeypatch.setattr(server.server.session, "inspect", never)
    monkeypatch.setattr(programs_api, "INSPECT_S", 0.05)
    found = http.get("/programs/p").json()
    assert (found["turns"], found["state"], found["account"], found["calls"]) == (1, "person", None, [])


@pytest.mark.parametrize("is_there", [False, True])
def test_hints_are_refused_while_the_engine_does_not_answer(is_there, opened, monkeypatch):
    server, http = opened
    http.post("/programs", json={"id": "p"}).raise_for_status()
    server.server.is_engine_there = lambda: is_there

    async def never(command):
        await asyncio.Event().wait()

    monkeypatch.setattr(server.server.session, "ask", never)
    monkeypatch.setattr(programs_api, "HINT_S", 0.05)
    answer = http.post("/programs/p/hints", json={"hints": [{"action": "release"}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
    assert answer.headers["retry-after"] == "1"


def test_a_granted_hint_keeps_the_program_and_so_does_an_event(serve):
    with serve(program_idle_s=1.5) as server, httpx.Client(base_url=server.v1, timeout=20) as http:

        def chat(name):
            http.post("/chat/completions", json=CHAT, headers={"x-treadle-program-id": name}).raise_for_status()

        chat("retained")
        wish = {"hints": [{"action": "retain", "seconds": 60}]}
        assert http.post("/programs/retained/hints", json=wish).json()["data"][0]["outcome"] == "granted"
        chat("told")
        chat("idle")
        number, states, end = 0, {}, time.monotonic() + 20
        while states.get("idle") != "ended":
            number += 1
            event = {"id": str(number), "type": "step", "name": "on"}
            http.post("/programs/told/events", json={"events": [event]}).raise_for_status()
            states = {name: http.get(f"/programs/{name}").json()["state"] for name in ("retained", "told", "idle")}
            assert time.monotonic() < end
            time.sleep(0.02)
        assert states == {"retained": "person", "told": "person", "idle": "ended"}


def test_a_graph_cannot_be_given(opened):
    _, http = opened
    answer = http.post("/programs", json={"id": "p", "graph": {"nodes": []}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "graph")
    assert http.get("/programs/p").status_code == 404


def test_ids_of_the_inside_stay_inside(opened):
    server, http = opened
    http.post("/chat/completions", json=CHAT, headers={"x-treadle-program-id": "p"}).raise_for_status()
    http.post("/programs/p/hints", json={"hints": [{"action": "demote"}]}).raise_for_status()
    found = http.get("/programs/p")
    assert found.json()["decisions"][-1]["subject"] == "p"
    (program,) = server.server.programs._roll
    assert program.id not in found.text


def test_names_of_a_part_and_a_parent_that_cannot_be_shown_are_left_out(opened):
    _, http = opened
    program = {"id": "p", "step": "a\x1b[2Jb", "parent": "a\nb"}
    http.post("/chat/completions", json={**CHAT, "program": program}).raise_for_status()
    assert [each["id"] for each in http.get("/programs").json()["data"]] == ["p"]
    found = http.get("/programs/p").json()
    assert (found["parent"], found["step"], found["turns"]) == (None, None, 1)
