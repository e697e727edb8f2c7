"""The Programs API over real HTTP: begin, look, tell, hint, draw, end; and never another tenant's."""

from __future__ import annotations

import json
import re
import time
from xml.etree import ElementTree

import httpx
import pytest

from treadle.runtime.server.tenants import key_digest, new_key

LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
MESSAGES = [{"role": "user", "content": "Hello"}]


def begin(http, **body):
    answer = http.post("/v1/programs", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


def chat(http, messages=MESSAGES, program=None, **body):
    """A turn of a program that a header names, or a field of the body, or nothing."""
    headers = {"x-treadle-program-id": program} if isinstance(program, str) else {}
    body = {"model": "treadle", "messages": messages, "max_tokens": 4, "temperature": 0, **body}
    if isinstance(program, dict):
        body["program"] = program
    answer = http.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def tell(http, program, *events):
    answer = http.post(f"/v1/programs/{program}/events", json={"events": list(events)})
    assert answer.status_code == 200, answer.text
    return [(each["id"], each["status"]) for each in answer.json()["data"]]


def hint(http, program, **wish):
    answer = http.post(f"/v1/programs/{program}/hints", json={"hints": [wish]})
    assert answer.status_code == 200, answer.text
    return answer.json()["data"][0]


def event(event_id, kind, **more):
    return {"id": event_id, "type": kind, **more}


class TestLife:
    def test_begin_use_look_end(self, http):
        program = begin(http, kind="greeter")
        assert program["state"] == "idle" and re.fullmatch(r"prog_[0-9a-f]{24}", program["id"])
        answer = chat(http, program=program["id"])
        assert answer.headers["x-treadle-program-id"] == program["id"]
        listed = http.get("/v1/programs").json()["data"]
        assert (listed[0]["id"], listed[0]["turns"]) == (program["id"], 1)
        detail = http.get(f"/v1/programs/{program['id']}").json()
        assert detail["state"] == "person" and detail["account"]["decoded"] == 4
        assert detail["leases"][0]["waits_for"] == "person" and detail["leases"][0]["kept_tokens"] > 0
        assert "waits for its next request" in detail["why"][0]
        assert {"admit", "finish"} <= {decision["action"] for decision in detail["decisions"]}
        ended = http.delete(f"/v1/programs/{program['id']}").json()
        assert ended["deleted"] and ended["account"]["calls"] == 1
        assert http.get(f"/v1/programs/{program['id']}").status_code == 404
        assert program["id"] not in [each["id"] for each in http.get("/v1/programs").json()["data"]]

    def test_a_request_without_a_name_continues_its_conversation(self, http):
        first = chat(http)
        message = first.json()["choices"][0]["message"]
        second = chat(http, [*MESSAGES, message, {"role": "user", "content": "And then?"}])
        assert first.headers["x-treadle-program-id"] == second.headers["x-treadle-program-id"]
        usage = second.json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > first.json()["usage"]["prompt_tokens"]

    def test_a_name_that_is_live_cannot_begin_again(self, http):
        begin(http, id="only one")
        answer = http.post("/v1/programs", json={"id": "only one"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "program_exists")
        http.delete("/v1/programs/only%20one")
        begin(http, id="only one")
        http.delete("/v1/programs/only%20one")

    def test_ids_with_slashes_have_addresses(self, http):
        begin(http, id="team/agent?1")
        assert http.get("/v1/programs/team%2Fagent%3F1").json()["id"] == "team/agent?1"
        http.delete("/v1/programs/team%2Fagent%3F1")

    def test_the_list_is_as_long_as_asked_for(self, http):
        for _ in range(3):
            begin(http)
        answer = http.get("/v1/programs", params={"limit": 2}).json()
        assert len(answer["data"]) == 2 and answer["has_more"]

    @pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "\u0661", "1e3", "99999999999"])
    def test_a_limit_that_is_none_is_refused(self, http, limit):
        answer = http.get("/v1/programs", params={"limit": limit})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit")

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"id": ""}, "id"),
            ({"id": "a\nb"}, "id"),
            ({"id": 7}, "id"),
            ({"priority": 11}, "priority"),
            ({"priority": True}, "priority"),
            ({"deadline_s": 0}, "deadline_s"),
            ({"objective": "soon"}, "objective"),
            ({"kind": "\u00e9"}, "kind"),
        ],
    )
    def test_what_cannot_begin_says_why(self, http, body, param):
        answer = http.post("/v1/programs", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)

    def test_the_last_request_ends_the_program(self, http):
        chat(http, program="short")
        chat(http, program={"id": "short", "final": True})
        detail = http.get("/v1/programs/short").json()
        assert detail["state"] == "ended" and detail["why"] == ["It has ended: said to be final."]
        assert http.delete("/v1/programs/short").json()["account"]["calls"] == 2
        assert http.delete("/v1/programs/short").status_code == 404


class TestInference:
    def test_a_tool_runs_from_the_turn_that_called_it_to_the_request_that_brings_its_id_back(self, http):
        asked = {"tools": [LOOK], "max_tokens": 64, "parallel_tool_calls": False}
        first = chat(http, tool_choice="required", **asked)
        program, message = first.headers["x-treadle-program-id"], first.json()["choices"][0]["message"]
        (call,) = message["tool_calls"]
        detail = http.get(f"/v1/programs/{program}").json()
        assert (detail["state"], detail["waits_for"][0]["call_id"]) == ("tool", call["id"])
        assert detail["leases"][0]["waits_for"] == "look"
        result = {"role": "tool", "tool_call_id": call["id"], "content": "nothing"}
        second = chat(http, [*MESSAGES, message, result], **asked, tool_choice="none")
        assert second.headers["x-treadle-program-id"] == program
        before, after = first.json()["usage"], second.json()["usage"]
        # All that was said so far is found again, the model's own call included, but for the token that ended it.
        assert after["prompt_tokens_details"]["cached_tokens"] >= before["total_tokens"] - 2
        graph = http.get(f"/v1/programs/{program}/graph").json()
        assert [(node["kind"], node["name"]) for node in graph["nodes"]][:3] == [
            ("llm", "chat"),
            ("tool", "look"),
            ("llm", "chat"),
        ]
        kinds = {(edge["source"], edge["target"]): edge["kind"] for edge in graph["edges"]}
        assert kinds["llm-1", "tool-2"] == "calls" and kinds["llm-1", "llm-3"] == "extends"
        assert kinds["tool-2", "llm-3"] == "value"
        assert http.delete(f"/v1/programs/{program}").json()["account"]["tools"] == 1


class TestEvents:
    def test_a_tool_that_the_client_tells_of(self, http):
        program = begin(http)["id"]
        chat(http, program=program)
        assert tell(http, program, event("1", "tool_start", call_id="c", name="search")) == [("1", "accepted")]
        detail = http.get(f"/v1/programs/{program}").json()
        assert detail["state"] == "tool" and detail["waits_for"][0]["tool"] == "search"
        assert detail["leases"][0]["waits_for"] == "search"
        assert "tool search" in detail["why"][0]
        assert tell(http, program, event("2", "tool_end", call_id="c")) == [("2", "accepted")]
        account = http.delete(f"/v1/programs/{program}").json()["account"]
        assert account["tools"] == 1 and account["tool_wait_s"] > 0

    def test_an_event_counts_once(self, http):
        program = begin(http)["id"]
        start = event("1", "tool_start", call_id="c", name="search")
        assert tell(http, program, start, start) == [("1", "accepted"), ("1", "duplicate")]
        assert tell(http, program, start) == [("1", "duplicate")]
        assert len(http.get(f"/v1/programs/{program}/graph").json()["nodes"]) == 1

    def test_an_end_that_comes_before_its_start(self, http):
        program = begin(http)["id"]
        told = tell(
            http,
            program,
            event("1", "tool_end", call_id="c"),
            event("2", "tool_start", call_id="c", name="search"),
            event("3", "tool_end", call_id="c"),
        )
        assert told == [("1", "accepted"), ("2", "late"), ("3", "late")]
        assert http.get(f"/v1/programs/{program}").json()["state"] == "idle"

    def test_a_step_names_what_follows(self, http):
        program = begin(http)["id"]
        tell(http, program, event("1", "step", name="plan"))
        chat(http, program=program)
        assert http.get(f"/v1/programs/{program}/graph").json()["nodes"][0]["name"] == "plan"

    def test_after_the_end_all_is_late(self, http):
        program = begin(http)["id"]
        told = tell(http, program, event("1", "end"), event("2", "step", name="x"), event("1", "end"))
        assert told == [("1", "accepted"), ("2", "late"), ("1", "duplicate")]
        assert tell(http, program, event("3", "end")) == [("3", "late")]

    @pytest.mark.parametrize(
        "bad",
        [
            {"id": "1", "type": "tool_start", "name": "search"},
            {"id": "1", "type": "tool_start", "call_id": "c"},
            {"id": "1", "type": "tool_end"},
            {"id": "1", "type": "step"},
            {"id": "1", "type": "begin"},
            {"type": "end"},
            {"id": "", "type": "end"},
            {"id": "1", "type": "tool_end", "call_id": "c" * 257},
            {"id": "1", "type": "tool_start", "call_id": "c", "name": "n", "typical_s": -1},
        ],
    )
    def test_an_event_that_cannot_be_is_refused_and_none_of_its_batch_is_taken(self, http, bad):
        program = begin(http)["id"]
        good = event("good", "step", name="plan")
        answer = http.post(f"/v1/programs/{program}/events", json={"events": [good, bad]})
        assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("events[1]")
        assert http.get(f"/v1/programs/{program}").json()["step"] is None

    @pytest.mark.parametrize("events", [[], [event(str(i), "end") for i in range(257)], None, "x"])
    def test_a_batch_has_a_size(self, http, events):
        program = begin(http)["id"]
        assert http.post(f"/v1/programs/{program}/events", json={"events": events}).status_code == 400


class TestHints:
    def test_are_answered_while_no_request_is_active(self, http):
        program = begin(http)["id"]
        nothing = hint(http, program, action="retain", seconds=60)
        assert nothing["outcome"] == "dropped" and "come to rest" in nothing["reason"]
        chat(http, program=program)
        granted = hint(http, program, action="retain", seconds=60)
        assert (granted["outcome"], granted["granted_s"]) == ("granted", 60) and granted["tokens"] > 0
        assert abs(granted["granted_until"] - time.time() - 60) < 5
        assert "a hint retains them for" in http.get(f"/v1/programs/{program}").json()["why"][-1]
        clipped = hint(http, program, action="retain", seconds=7200)
        assert (clipped["outcome"], clipped["granted_s"]) == ("clipped", 3600)
        assert hint(http, program, action="demote")["outcome"] == "granted"
        detail = http.get(f"/v1/programs/{program}").json()
        assert detail["leases"][0]["expected_s"] is None and "give way before others" in detail["why"][-1]
        assert hint(http, program, action="release")["outcome"] == "granted"
        detail = http.get(f"/v1/programs/{program}").json()
        assert detail["leases"] == []
        assert [d["action"] for d in detail["decisions"]][-4:] == ["retain", "retain", "demote", "release"]
        assert chat(http, program=program).status_code == 200

    def test_for_a_program_that_has_ended_are_dropped(self, http):
        program = begin(http)["id"]
        tell(http, program, event("1", "end"))
        assert hint(http, program, action="release")["reason"] == "the program has ended"

    @pytest.mark.parametrize(
        ("wish", "param"),
        [
            ({"action": "retain"}, "hints[0].seconds"),
            ({"action": "retain", "seconds": 0}, "hints[0].seconds"),
            ({"action": "retain", "seconds": True}, "hints[0].seconds"),
            ({"action": "pin", "seconds": 1}, "hints[0]"),
            ({}, "hints[0]"),
        ],
    )
    def test_that_cannot_be_are_refused(self, http, wish, param):
        program = begin(http)["id"]
        answer = http.post(f"/v1/programs/{program}/hints", json={"hints": [wish]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


class TestGraph:
    def test_in_three_forms(self, http):
        program = begin(http)["id"]
        chat(http, program=program)
        tell(http, program, event("1", "tool_start", call_id="c", name="<b>search</b>"))
        graph = http.get(f"/v1/programs/{program}/graph")
        assert [node["kind"] for node in graph.json()["nodes"]] == ["llm", "person", "tool"]
        mermaid = http.get(f"/v1/programs/{program}/graph", params={"format": "mermaid"})
        assert mermaid.text.startswith("flowchart TD\n") and mermaid.headers["content-type"].startswith("text/plain")
        svg = http.get(f"/v1/programs/{program}/graph", params={"format": "svg"})
        assert svg.headers["content-type"].startswith("image/svg+xml")
        assert "default-src 'none'" in svg.headers["content-security-policy"]
        assert "<b>" not in svg.text and ElementTree.fromstring(svg.text) is not None
        bad = http.get(f"/v1/programs/{program}/graph", params={"format": "dot"})
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "format")


def feed(http, **headers):
    return http.stream("GET", "/v1/events", headers=headers)


def read_events(stream, until):
    """Events of a feed, up to the first of a kind."""
    events, fields = [], {}
    for line in stream.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            events.append((fields["id"], fields["event"], json.loads(fields["data"])))
            if fields["event"] == until:
                return events
            fields = {}
    raise AssertionError("the feed ended")


class TestFeed:
    def test_tells_what_happens_and_goes_on_from_where_it_was_left(self, serve):
        with serve() as server, httpx.Client(base_url=server.url, timeout=60) as http:
            with feed(http) as stream:
                program = begin(http)["id"]
                chat(http, program=program)
                events = read_events(stream, "turn.finished")
            kinds = [kind for _, kind, _ in events if kind != "decision"]
            assert kinds == ["program.opened", "turn.started", "turn.finished"]
            assert "admit" in [data["action"] for _, kind, data in events if kind == "decision"]
            assert all(data["program"] == program for _, _, data in events)
            http.delete(f"/v1/programs/{program}")
            with feed(http, **{"last-event-id": events[0][0]}) as stream:
                again = read_events(stream, "program.ended")
            assert again[: len(events) - 1] == events[1:]
            with feed(http, **{"last-event-id": "of another life"}) as stream:
                assert read_events(stream, "gap")[0][2]["missed"] is None


@pytest.fixture
def tenants(serve, tmp_path):
    """A server of two tenants, and a client for each."""
    keys = {name: new_key() for name in ("alice", "bob")}
    path = tmp_path / "keys.toml"
    path.write_text(
        "".join(f'[[tenants]]\nname = "{name}"\nkeys = ["{key_digest(key)}"]\n' for name, key in keys.items())
    )
    with serve(keys=str(path)) as server:
        clients = [
            httpx.Client(base_url=server.url, timeout=60, headers={"authorization": f"Bearer {keys[name]}"})
            for name in ("alice", "bob")
        ]
        yield clients
        for client in clients:
            client.close()


class TestTenants:
    ROUTES = (
        ("GET", "", None),
        ("DELETE", "", None),
        ("GET", "/graph", None),
        ("POST", "/events", {"events": [{"id": "1", "type": "end"}]}),
        ("POST", "/hints", {"hints": [{"action": "release"}]}),
    )

    def test_another_tenants_program_looks_like_none_at_all(self, tenants):
        alice, bob = tenants
        begin(alice, id="secret")
        chat(alice, program="secret")
        for method, path, body in self.ROUTES:
            there = bob.request(method, f"/v1/programs/secret{path}", json=body)
            nowhere = bob.request(method, f"/v1/programs/nobody{path}", json=body)
            assert there.status_code == nowhere.status_code == 404
            assert there.text.replace("secret", "nobody") == nowhere.text
        assert bob.get("/v1/programs").json()["data"] == []
        assert alice.get("/v1/programs/secret").json()["state"] == "person"

    def test_the_same_name_and_the_same_conversation_are_two_programs(self, tenants):
        alice, bob = tenants
        first = chat(alice, program="n")
        message = first.json()["choices"][0]["message"]
        more = [*MESSAGES, message, {"role": "user", "content": "And then?"}]
        other = chat(bob, more)
        assert other.headers["x-treadle-program-id"] != "n"
        assert other.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        chat(bob, program="n")
        bob.delete("/v1/programs/n")
        assert chat(alice, more).headers["x-treadle-program-id"] == "n"

    def test_the_feed_is_of_one_tenant(self, tenants):
        alice, bob = tenants
        with feed(bob) as stream:
            begin(alice, id="of alice")
            begin(bob, id="of bob")
            ((_, _, data),) = read_events(stream, "program.opened")
        assert data["program"] == "of bob"

    def test_a_key_is_needed(self, tenants):
        alice, _ = tenants
        for path in ("/v1/programs", "/v1/programs/x", "/v1/events"):
            assert alice.get(path, headers={"authorization": ""}).status_code == 401
