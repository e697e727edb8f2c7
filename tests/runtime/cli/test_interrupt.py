"""Ctrl-C: a workflow, and a model that is being loaded, end at once, with one clear line, and leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from .conftest import PATIENCE, POLITE, TREADLE

WORKFLOW = """
import asyncio, time
from treadle.dsl import llm, program, prompt, tool

@llm(max_tokens=2000)
async def story(topic: str) -> str:
    return prompt(f"Write a very long story about {topic}.")

@tool(effects="read")
def nap() -> str:
    print("tool\\n", end="", flush=True)
    time.sleep(600)
    return ""

@tool(effects="read")
async def nap_on_the_loop() -> str:
    print("async tool\\n", end="", flush=True)
    await asyncio.sleep(600)
    return ""

async def work() -> str:
    text, naps = story("looms"), [nap(), nap_on_the_loop()]
    async for _ in text.stream():
        print("decode\\n", end="", flush=True)
        break
    return await naps[0]

async def main(scoped: bool) -> str:
    if not scoped:
        return await work()
    async with program("interrupted"):
        return await work()
"""

LEARNING = """
import asyncio
from treadle.dsl import llm, prompt

@llm(max_tokens=4)
async def word() -> str:
    return prompt("Say a word.")

async def main() -> None:
    await word()
    print("learned", flush=True)
    await asyncio.sleep(600)
"""

LOADING = """
import asyncio, sys, threading
from treadle.runtime import local

async def main() -> None:
    print("loading", flush=True)
    async with local("smollm2"):
        print("loaded", flush=True)
        await asyncio.sleep(600)

try:
    asyncio.run(main())
except KeyboardInterrupt:
    print([thread.name for thread in threading.enumerate()], flush=True)
    sys.exit(130)
"""


@contextlib.contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, of which nothing may be left."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, **POLITE}, start_new_session=True, **pipes) as process:
        patience = threading.Timer(PATIENCE, os.killpg, (process.pid, signal.SIGKILL))
        patience.start()
        try:
            yield process
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            patience.cancel()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def read_until(process: subprocess.Popen[str], lines: set[str]) -> None:
    """Reads until each of the lines has been printed."""
    for line in process.stdout:
        lines.discard(line.strip())
        if not lines:
            return
    raise AssertionError(f"it ended before it printed {lines}: {process.stderr.read()}")


@pytest.mark.parametrize(("scoped", "options"), [("true", ()), ("false", ()), ("true", ("--json",))])
def test_a_workflow_ends_while_a_call_decodes_and_tools_sleep(tmp_path, scoped, options):
    script = tmp_path / "flow.py"
    script.write_text(WORKFLOW)
    with started(TREADLE, "run", *options, str(script), scoped) as process:
        read_until(process, {"tool", "async tool", "decode"})
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, stderr
    assert time.monotonic() - sent < PATIENCE / 4
    assert "Traceback" not in stderr and stderr.count("treadle: interrupted\n") == 1
    assert ("critical path:" in stderr) is not bool(options)


@pytest.mark.parametrize("pause", [0.0, 0.02, 0.2])
def test_an_impatient_second_ctrl_c_shows_no_traceback_either(tmp_path, pause):
    script = tmp_path / "flow.py"
    script.write_text(WORKFLOW)
    with started(TREADLE, "run", str(script), "true") as process:
        read_until(process, {"decode"})
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(pause)
        _, stderr = process.communicate(timeout=PATIENCE)
    assert (process.returncode, "Traceback" in stderr) == (130, False), stderr


def test_what_was_learned_until_then_is_kept(tmp_path):
    script, kept = tmp_path / "flow.py", tmp_path / "learned.json"
    script.write_text(LEARNING)
    with started(TREADLE, "run", "--learned", str(kept), str(script)) as process:
        read_until(process, {"learned"})
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, stderr
    assert [row[:2] for row in json.loads(kept.read_text())["outputs"]["names"]] == [["word", "word"], ["word", ""]]


@pytest.mark.parametrize("seconds", [0.0, 0.3, 0.9, 1.2, 1.4])
def test_a_model_that_is_being_loaded_is_let_go(seconds):
    with started(sys.executable, "-c", LOADING) as process:
        assert process.stdout.readline() == "loading\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=PATIENCE)
    assert (process.returncode, stderr) == (130, "")
    assert stdout.endswith("['MainThread']\n")
