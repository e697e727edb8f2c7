"""`treadle serve` as a process: what it prints works when pasted, and SIGTERM lets requests finish."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time

import httpx
import pytest

from .conftest import PATIENCE, POLITE, TREADLE

SMALL = ("--kv-pages", "600", "--threads", "1")
BODY = {"model": "smollm2", "messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0}


class Serving:
    """A server's process, and what it has printed up to the line to paste."""

    def __init__(self, *args: str) -> None:
        self.process = subprocess.Popen(
            [TREADLE, "serve", *args, "--port", "0"],
            env={**os.environ, **POLITE},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def block(self) -> str:
        lines = []
        deadline = time.monotonic() + PATIENCE
        while not (lines and lines[-1].startswith("  curl")):
            assert time.monotonic() < deadline and self.process.poll() is None, self.process.stderr.read()
            lines.append(self.process.stdout.readline())
        return "".join(lines)

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@pytest.fixture
def serving():
    started = []

    def start(*args):
        started.append(Serving(*args))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


def children_of(pid):
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()


@pytest.mark.parametrize("engine", ["process", "in-process"])
def test_what_is_printed_works_when_pasted(serving, engine):
    server = serving("smollm2", *SMALL, "--engine", engine)
    block = server.block()
    for expected in ("smollm2", "none needed", "cpu", "600 of 16 tokens"):
        assert expected in block
    assert len(children_of(server.process.pid)) == (1 if engine == "process" else 0)
    export = re.search(r"export OPENAI_BASE_URL=(\S+) OPENAI_API_KEY=(\S+)", block)
    assert httpx.get(f"{export[1]}/models", headers={"authorization": f"Bearer {export[2]}"}).status_code == 200
    if shutil.which("curl"):
        pasted = re.search(r"^  (curl .*)$", block, re.MULTILINE)[1]
        done = subprocess.run(["bash", "-c", pasted], capture_output=True, text=True, timeout=PATIENCE, check=True)
        assert "Paris" in json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert server.terminate() == 0


def test_sigterm_lets_a_stream_finish_and_ends_with_zero(serving):
    server = serving("smollm2", *SMALL)
    url = re.search(r"http://\S+/v1", server.block())[0]
    body = {**BODY, "stream": True, "max_completion_tokens": 40, "logit_bias": {"2": -100}}
    with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=PATIENCE) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        *_, last = (line for line in lines if line)
    assert last == "data: [DONE]"
    children = children_of(server.process.pid)
    assert server.process.wait(PATIENCE) == 0
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)


def test_a_second_sigterm_does_not_wait(serving):
    server = serving("smollm2", *SMALL, "--drain-timeout-s", "600")
    url = re.search(r"http://\S+/v1", server.block())[0]
    body = {**BODY, "stream": True, "max_completion_tokens": 8000, "logit_bias": {"2": -100}}
    with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=PATIENCE) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert next(lines) is not None and server.process.poll() is None
        assert server.terminate() == 0


def test_a_server_can_be_stopped_while_it_loads(serving):
    server = serving("smollm2", *SMALL)
    deadline = time.monotonic() + PATIENCE
    while not children_of(server.process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.terminate() == 0


def test_random_weights_are_served_by_token_ids(serving):
    block = serving("random:tiny-llama", "--threads", "1").block()
    pasted = re.search(r"^  (curl .*)$", block, re.MULTILINE)[1]
    assert "/v1/completions" in pasted and '"prompt": [' in pasted


def test_the_settings_are_printed_without_serving(treadle):
    done = treadle("serve", "--print-config", "--port", "1234")
    assert done.returncode == 0 and "port = 1234" in done.stdout


@pytest.mark.parametrize("args", [("no-such-model",), ("random:no-such-shape",), ("--host", "0.0.0.0")])
def test_what_cannot_be_served_is_said(treadle, args):
    done = treadle("serve", *args, "--port", "0")
    assert done.returncode == 1 and "treadle: error:" in done.stderr and "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_said(serving, treadle):
    port = re.search(r":(\d+)/v1", serving("random:tiny-llama", "--threads", "1").block())[1]
    done = treadle("serve", "random:tiny-llama", "--port", port, "--threads", "1")
    assert done.returncode == 1 and port in done.stderr and "Traceback" not in done.stderr


def test_a_server_whose_engine_dies_too_often_ends_and_says_so(serving):
    server = serving("smollm2", *SMALL, "--engine-restarts", "0")
    server.block()
    (engine,) = subprocess.check_output(["pgrep", "-P", str(server.process.pid)], text=True).split()
    os.kill(int(engine), signal.SIGKILL)
    assert server.process.wait(PATIENCE) == 1
    assert "treadle: error: the engine is gone" in server.process.stderr.read()
