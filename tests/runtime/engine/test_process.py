"""The engine's process, spoken to over its socket: it loads, says what it is, and lives no longer than its owner."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.engine.process import Connection, config_from
from treadle.runtime.engine.wire import EngineInfo, Failed, Load
from treadle.scheduler import CallFinished, OpenProgram, SamplingParams, SubmitCall, TokensOut
from treadle.scheduler.config import Costs

PATIENCE_S = 60.0
TINY = EngineConfig(dtype="float32", num_pages=256, page_size=4, num_threads=1)
LONG = SubmitCall("long", "p", (1, 2, 3), SamplingParams(temperature=0.0), 1000)
FRUGAL_OWNER = """
import asyncio, sys
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.engine.supervisor import open_engine_process

async def main():
    engine = open_engine_process("random:tiny-llama", EngineConfig(dtype="float32", num_pages=64))
    if sys.argv[1] == "ready":
        await engine.ready()
    while engine.pid is None:
        await asyncio.sleep(0.01)
    print(engine.pid, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@contextmanager
def process(model="random:tiny-llama", config=TINY):
    """The process and the way to it, after it was told what to load."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "treadle.runtime.engine.process", str(theirs.fileno())]
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as child:
        theirs.close()
        ours.settimeout(PATIENCE_S)
        connection = Connection(ours)
        connection.write([Load(model, asdict(config))])
        try:
            yield child, connection
        finally:
            child.kill()


def is_gone(pid: int) -> bool:
    """Whether the process has ended: the one who inherited it may not have taken note yet."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def until(condition, what="it never came to that"):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_it_says_what_engine_it_is_and_answers_commands():
    with process() as (child, connection):
        (info,) = connection.read()
        assert isinstance(info, EngineInfo)
        assert (info.num_pages, info.page_size, info.vocab_size) == (256, 4, 512)
        assert (info.dtype, info.device) == ("float32", "cpu")
        connection.write([OpenProgram("p"), SubmitCall("c", "p", (1, 2), SamplingParams(temperature=0.0), 3)])
        events = []
        while not (events and isinstance(events[-1], CallFinished)):
            events += connection.read()
        assert [type(event) for event in events] == [TokensOut] * 3 + [CallFinished]
        assert child.poll() is None


@pytest.mark.parametrize(
    ("model", "config", "kind", "message"),
    [
        ("random:nothing", TINY, "ModelNotFoundError", "no shape is called 'nothing'; choose one of"),
        ("/no/such/model", TINY, "ModelNotFoundError", "/no/such/model"),
        ("random:tiny-llama", EngineConfig(num_pages=10**12), "InvalidRequestError", "use fewer pages"),
        ("random:tiny-llama", EngineConfig(order="lifo"), "InvalidRequestError", "unknown order policy 'lifo'"),
    ],
)
def test_what_keeps_it_from_loading_is_its_last_word(model, config, kind, message):
    with process(model, config) as (child, connection):
        (failed,) = connection.read()
        assert isinstance(failed, Failed)
        assert failed.kind == kind
        assert message in failed.message
        assert connection.read() is None
        assert child.wait(PATIENCE_S) == 1


def test_it_ends_with_status_0_when_the_other_end_is_closed():
    with process() as (child, connection):
        connection.read()
        connection.write([OpenProgram("p"), LONG])
        connection.read()
        connection._socket.shutdown(socket.SHUT_WR)
        assert child.wait(PATIENCE_S) == 0


def test_it_ends_when_the_other_end_is_closed_while_it_loads():
    with process() as (child, connection):
        connection._socket.close()
        assert child.wait(PATIENCE_S) == 0


def test_what_was_learned_is_kept_when_it_ends(tmp_path):
    config = EngineConfig(dtype="float32", num_pages=64, learned=str(tmp_path / "learned.json"))
    with process(config=config) as (child, connection):
        connection.read()
        connection._socket.shutdown(socket.SHUT_WR)
        child.wait(PATIENCE_S)
    assert (tmp_path / "learned.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_that_are_meant_for_its_owner_do_not_end_it(number):
    with process() as (child, connection):
        connection.read()
        child.send_signal(number)
        connection.write([OpenProgram("p"), LONG])
        assert connection.read()
        child.send_signal(number)
        assert connection.read()
        assert child.poll() is None


@pytest.mark.parametrize("moment", ["loading", "ready"])
def test_an_owner_that_is_killed_leaves_no_process_behind(moment):
    with subprocess.Popen([sys.executable, "-c", FRUGAL_OWNER, moment], stdout=subprocess.PIPE, text=True) as owner:
        pid = int(owner.stdout.readline())
        assert not is_gone(pid)
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait(PATIENCE_S)
    until(lambda: is_gone(pid), "the engine outlives its owner")


def test_a_configuration_arrives_as_it_was():
    config = EngineConfig(num_pages=3, costs=Costs(1e-4, 0.0, 1e-6), learned="x", overlap=True)
    assert config_from(asdict(config)) == config


def test_the_owner_of_a_process_needs_no_tensor_library():
    modules = "treadle.runtime.engine.supervisor, treadle.runtime.engine.session"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
