"""`treadle ps`, `top` and `explain` look at a running server, and say clearly when there is none."""

from __future__ import annotations

import json
import re
import socket
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from support.serving import served, smollm2_tokenizer, tiny_engine

from treadle.runtime.cli.main import main
from treadle.runtime.server.tenants import key_digest, new_key

ESCAPE = "\x1b]0;stolen\x07"


@pytest.fixture(scope="module")
def server():
    """A server with three programs: one idle, one that waits for a person, and one that waits for a tool."""
    with served(partial(tiny_engine, smollm2_tokenizer())) as server, httpx.Client(base_url=server.url) as http:
        http.post("/v1/programs", json={"id": "idle one"}).raise_for_status()
        for program in ("person", "tool"):
            body = {"model": "treadle", "messages": [{"role": "user", "content": program}], "max_tokens": 3}
            headers = {"x-treadle-program-id": program}
            http.post("/v1/chat/completions", json=body, headers=headers, timeout=60).raise_for_status()
        start = {"id": "1", "type": "tool_start", "call_id": "c", "name": f"search{ESCAPE}"}
        http.post("/v1/programs/tool/events", json={"events": [start]}).raise_for_status()
        yield server


@pytest.fixture
def treadle(server, capsys, monkeypatch):
    """Runs a command against the server; returns its exit code, output and errors."""
    monkeypatch.setenv("TREADLE_URL", server.url)

    def run(*args):
        code = main(list(args))
        return code, *capsys.readouterr()

    return run


def test_ps_lists_programs_those_used_last_first(treadle):
    code, out, _ = treadle("ps")
    assert code == 0
    header, *rows = out.splitlines()
    assert header.split() == ["PROGRAM", "TURNS", "NODES", "AGE", "DOES"]
    assert [re.split(" {2,}", row)[0] for row in rows] == ["tool", "person", "idle one"]
    assert "waits for search" in rows[0] and "waits for its next request" in rows[1] and rows[2].endswith("idle")


def test_ps_prints_json_for_programs(treadle):
    code, out, _ = treadle("ps", "--json", "--limit", "2")
    assert code == 0
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["tool", "person"]


def test_explain_says_what_a_program_waits_for_and_what_was_decided(treadle):
    code, out, _ = treadle("explain", "tool")
    assert code == 0
    assert "It waits for the tool search" in out
    assert re.search(r"\d+ of \d+ tokens of call-\d+ are kept; it is expected back in", out)
    assert re.search(r"ago  admit +call-\d+: slot", out) and re.search(r"ago  finish +call-\d+: length", out)
    code, out, _ = treadle("explain", "tool", "--json")
    assert json.loads(out)["state"] == "tool"


def test_top_shows_programs_and_pages(treadle):
    code, out, _ = treadle("top", "--once")
    assert code == 0
    assert "3 programs" in out and "waits for search" in out and re.search(r"pages: .*free", out)


@pytest.mark.parametrize("command", [("ps",), ("top", "--once"), ("explain", "tool")])
def test_nothing_of_others_reaches_the_terminal_as_a_command(treadle, command):
    assert "\x1b]" not in treadle(*command)[1] and "\x07" not in treadle(*command)[1]


def test_an_unknown_program_is_an_error(treadle):
    code, out, err = treadle("explain", "no/body")
    assert (code, out) == (1, "") and "there is no program 'no/body'" in err


def test_a_limit_that_is_none_is_an_error(treadle):
    code, _, err = treadle("ps", "--limit", "0")
    assert code == 1 and "limit: give a number from 1" in err


@pytest.mark.parametrize("command", [("ps",), ("top", "--once"), ("explain", "p")])
def test_without_a_server_the_error_says_how_to_start_one(treadle, command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code, out, err = treadle(*command, "--url", f"http://127.0.0.1:{port}")
    assert (code, out) == (1, "")
    assert "no server answers" in err and "treadle serve" in err and "Traceback" not in err


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http://", "127.0.0.1"])
def test_an_address_that_is_none_is_an_error(treadle, url):
    code, _, err = treadle("ps", "--url", url)
    assert code == 1 and "no address of a server" in err


def test_something_else_that_answers_is_an_error(treadle):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_):
            pass

    other = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        code, _, err = treadle("ps", "--url", f"http://127.0.0.1:{other.server_port}")
    finally:
        other.shutdown()
        other.server_close()
    assert code == 1 and "something else than JSON" in err


def test_a_server_with_keys_needs_one(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TREADLE_KEY", raising=False)
    key, path = new_key(), tmp_path / "keys.toml"
    path.write_text(f'[[tenants]]\nname = "a"\nkeys = ["{key_digest(key)}"]\n')
    with served(partial(tiny_engine, None), keys=str(path)) as server:
        assert main(["ps", "--url", server.url]) == 1
        assert "--api-key or TREADLE_KEY" in capsys.readouterr().err
        assert main(["ps", "--url", f"{server.url}/v1", "--api-key", key]) == 0
        monkeypatch.setenv("TREADLE_KEY", key)
        assert main(["top", "--once", "--url", server.url]) == 0
