"""The installed `treadle` command, run as a user runs it: in a pipe, or on a real terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TREADLE = str(Path(sys.executable).parent / "treadle")
PATIENCE = 120.0
"""Seconds. A loaded machine makes torch many times slower; nothing here takes ten on a quiet one."""

POLITE = {"OMP_WAIT_POLICY": "passive"}
"""Threads that sleep while they wait: where other work shares the cores, spinning ones take ten times as long."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def treadle() -> Run:
    """Runs `treadle ARGS` in pipes."""

    def run(*args: str, stdin: str = "", env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [TREADLE, *args],
            input=stdin,
            env={**os.environ, **POLITE, **(env or {})},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    return run


@dataclass
class Terminal:
    """A process on a pseudo-terminal, and what it has shown so far."""

    pid: int
    fd: int
    shown: str = ""
    _read_to: int = field(default=0, repr=False)

    def expect(self, pattern: str) -> str:
        """Reads until the pattern is shown after what was expected before; returns the text up to its end."""
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.shown[self._read_to :])):
            assert time.monotonic() < deadline and self._read(), f"no {pattern!r} in {self.shown[self._read_to :]!r}"
        text = self.shown[self._read_to : self._read_to + found.end()]
        self._read_to += found.end()
        return text

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt(self) -> None:
        """What the terminal does at Ctrl-C."""
        self.type("\x03")

    def exit_code(self) -> int:
        while self._read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        if not select.select([self.fd], [], [], PATIENCE)[0]:
            return False
        try:
            chunk = os.read(self.fd, 4096)
        except OSError:  # Linux says so when the other end is closed
            return False
        self.shown += chunk.decode(errors="replace")
        return bool(chunk)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Runs `treadle ARGS` on a terminal of its own."""
    started: list[Terminal] = []

    def run(*args: str) -> Terminal:
        pid, fd = pty.fork()
        if pid == 0:
            os.environ.update({**POLITE, "TERM": "dumb"})
            os.execv(TREADLE, [TREADLE, *args])
        started.append(Terminal(pid, fd))
        return started[-1]

    yield run
    for session in started:
        try:
            if os.waitpid(session.pid, os.WNOHANG)[0] == 0:
                os.kill(session.pid, signal.SIGKILL)
                os.waitpid(session.pid, 0)
        except ChildProcessError:
            pass
        os.close(session.fd)
