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
    ended: bool = False
    _read_to: int = field(default=0, repr=False)

    def expect(self, pattern: str) -> str:
        """Reads until the pattern is shown after what was expected before; returns the text up to its end."""
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.shown[self._read_to :])):
            left = deadline - time.monotonic()
            assert left > 0 and self._read(left), f"no {pattern!r} in {self.shown[self._read_to :][-500:]!r}"
        text = self.shown[self._read_to : self._read_to + found.end()]
        self._read_to += found.end()
        return text

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt(self) -> None:
        """What the terminal does at Ctrl-C."""
        self.type("\x03")

    def exit_code(self) -> int:
        return self._exit_code(PATIENCE, PATIENCE)

    def leave_with_ctrl_c(self) -> int:
        """Ctrl-C at the prompt, again each second until it works, and the exit code.

        One can be lost: Python's readline draws the prompt before it waits for input, and an interrupt between the
        two is noticed only at the next key. It happens to a bare `input()` too, where cores are busy.
        """
        return self._exit_code(1.0, PATIENCE, press="\x03")

    def _exit_code(self, pause: float, patience: float, press: str = "") -> int:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if press:
                self.type(press)
            until = min(deadline, time.monotonic() + pause)
            while time.monotonic() < until:
                self._read(0.05)
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.ended = True
                    return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"it did not end; it showed {self.shown[-500:]!r}")

    def _read(self, patience: float) -> bool:
        if not select.select([self.fd], [], [], patience)[0]:
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
        if not session.ended:
            os.kill(session.pid, signal.SIGKILL)
            os.waitpid(session.pid, 0)
        os.close(session.fd)
