"""The parent's side of a comparison: an engine in a process of its own, which computes only while it is asked to."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peers.serving import Settings

BENCHMARKS = Path(__file__).parents[1]
ADAPTERS = {
    "llama-cpp": "peers.llama_cpp",
    "transformers": "peers.transformers",
    "treadle": "peers.treadle",
    "vllm": "peers.vllm",
}
"""The module that makes each engine speak."""

END_S = 20.0
"""How long an engine may take to end once its input has."""
TAIL_CHARACTERS = 2000


class PeerError(Exception):
    """A peer that cannot be started, died, or did not answer in time."""


class PeerProcess:
    """An engine in the interpreter that it is installed in.

    Between requests the process is stopped: threads of its libraries that spin or look about take no time from others.

    Args:
        name: Of the engine, one of `ADAPTERS`.
        python: The interpreter.
        settings: What the engine is opened with, as soon as `open` is called.
        limit_s: The longest that an answer may take.
    """

    def __init__(self, name: str, python: str, settings: Settings, limit_s: float) -> None:
        self.name = name
        self._settings = settings
        self._limit_s = limit_s
        self._unread = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads)}
        command = [python, "-m", ADAPTERS[name]]
        try:
            self._process = subprocess.Popen(
                command,
                cwd=BENCHMARKS,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                process_group=0,
            )
        except OSError as error:
            self._errors.close()
            raise PeerError(f"{name}: {python} cannot be run ({error.strerror})") from error

    def open(self) -> dict[str, Any]:
        """Loads the model; what the engine says about itself."""
        return self.ask("open", **asdict(self._settings))

    def ask(self, kind: str, **request: Any) -> dict[str, Any]:
        """Sends a request and returns the answer. Raises `PeerError` if there is none."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # whoever died is noticed when there is no answer
            self._process.stdin.write(json.dumps({"kind": kind, **request}).encode() + b"\n")
        answer: dict[str, Any] = json.loads(self._read_line(kind))
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """Ends the process, by force if it does not end by itself."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._signal(signal.SIGKILL)
        self.close()

    def _read_line(self, kind: str) -> bytes:
        assert self._process.stdout is not None
        output, deadline = self._process.stdout.fileno(), time.monotonic() + self._limit_s
        while b"\n" not in self._unread:
            if not select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise self._error(f"no answer to {kind!r} within {self._limit_s:g} s")
            piece = os.read(output, 1 << 16)
            if not piece:
                raise self._error(f"ended with exit code {self._process.wait()} instead of an answer to {kind!r}")
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _error(self, what: str) -> PeerError:
        self._errors.seek(0)
        tail = self._errors.read().decode(errors="replace")[-TAIL_CHARACTERS:].strip()
        return PeerError(f"{self.name}: {what}. Its standard error ends with:\n{tail or '(nothing)'}")

    def _signal(self, number: int) -> None:
        """Signals the process and those that it started; they are a group of their own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def first_token_seconds(name: str, python: str, settings: Settings, prompt: list[int], limit_s: float) -> float:
    """From the start of a process to the answer that it has computed one token after a prompt."""
    start = time.perf_counter()
    with PeerProcess(name, python, settings, limit_s) as process:
        process.open()
        process.ask("complete", prompts=[prompt], new_tokens=1)
        return time.perf_counter() - start
