"""An engine in a process of its own, watched: when it dies, another one goes on with what it had under way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType

import msgspec

from treadle.runtime import errors
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.engine.journal import Journal
from treadle.runtime.engine.wire import LENGTH_BYTES, EngineInfo, Failed, Load, Message, decode, framed
from treadle.runtime.errors import EngineClosedError, TreadleError
from treadle.scheduler import CallFinished, Command, Event, Rejected, SubmitCall, Usage

CLOSE_S = 10.0
"""How long a process may take to end that was asked to."""
MAX_PAUSE_S = 30.0
READ_AHEAD = 1 << 20
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Restarts:
    """How often an engine may die before everybody is told that it is gone: more than `most` times in `window_s`.

    After one that died before it was ready there is a pause, of `pause_s` at first, then twice as long each time.
    """

    most: int = 5
    window_s: float = 600.0
    pause_s: float = 0.5


class EngineProcess:
    """An `EngineClient` to an engine in a child process. Use as `async with`, in one event loop.

    Commands may be sent at once; those that come while no engine is ready wait for it. When the process dies, a new one
    is told what the old one had not finished, and every call goes on after the last token that came: no token is lost,
    and none comes twice. Its KV is computed again.

    Attributes:
        info: What the engine is; None until the first one is ready.
        restarts: How often one had to be replaced.
    """

    def __init__(self, model: str, config: EngineConfig, limit: Restarts) -> None:
        self.info: EngineInfo | None = None
        self.restarts = 0
        self._load = Load(model, _plain(config))
        self._limit = limit
        self._journal = Journal()
        self._outbox: asyncio.Queue[tuple[Event, ...] | None] = asyncio.Queue()
        self._process: Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._failure: TreadleError | None = None
        self._closing = False
        self._settled = asyncio.Event()
        self._task = asyncio.create_task(self._supervise(), name="treadle-supervisor")

    async def __aenter__(self) -> EngineProcess:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def pid(self) -> int | None:
        """The process that runs or loads the engine now."""
        return self._process.pid if self._process is not None else None

    @property
    def is_ready(self) -> bool:
        """Whether an engine takes commands now."""
        return self._writer is not None

    async def ready(self) -> EngineInfo:
        """What the engine is, once it has loaded. Raises what kept it from loading."""
        await self._settled.wait()
        if self.info is None:
            raise self._failure or EngineClosedError("the engine was closed before it had loaded")
        return self.info

    def send(self, commands: Sequence[Command]) -> None:
        """Hands over commands, in order; for the event loop's thread only. Raises `EngineClosedError` if it is gone."""
        if self._task.done() or self._closing:
            raise self._gone() or EngineClosedError("the engine is closed; open a new one")
        try:
            data = framed(commands)
        except ValueError as error:
            if len(commands) == 1:
                self._outbox.put_nowait((_refused(commands[0], str(error)),))
            else:
                for command in commands:
                    self.send([command])
            return
        now = time.monotonic()
        for command in commands:
            self._journal.sent(command, now)
        if self._writer is not None:
            self._writer.write(data)

    async def events(self) -> AsyncIterator[tuple[Event, ...]]:
        """What happened, a batch for each step. Ends when the engine is closed; raises if it is gone for good."""
        while (batch := await self._outbox.get()) is not None:
            yield batch
        self._outbox.put_nowait(None)
        if (error := self._gone()) is not None:
            raise error

    def _gone(self) -> EngineClosedError | None:
        """Why there is no engine any more, for those who can do nothing about it."""
        error = self._failure
        return EngineClosedError(f"the engine is gone: {error}") if error is not None else None

    async def close(self) -> None:
        """Ends the process after the step that it is in. Calls that have not ended get no further event."""
        self._closing = True
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.write_eof()
            await asyncio.wait([self._task], timeout=CLOSE_S)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _supervise(self) -> None:
        deaths: deque[float] = deque()
        pause = self._limit.pause_s
        try:
            while True:
                was_ready, error = await self._live()
                if self._closing:
                    return
                now = time.monotonic()
                deaths.append(now)
                while deaths[0] < now - self._limit.window_s:
                    deaths.popleft()
                if self.info is None or len(deaths) > self._limit.most:
                    self._failure = error
                    log.error("%s; the engine is gone", error)
                    return
                self.restarts += 1
                log.warning("%s; another one goes on with %d calls", error, self._journal.num_calls)
                if was_ready:
                    self._outbox.put_nowait(tuple(self._journal.died()))
                    pause = self._limit.pause_s
                else:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, MAX_PAUSE_S)
        except Exception as error:
            self._failure = EngineClosedError(f"the engine's process cannot be had: {error}")
            raise
        finally:
            self._settled.set()
            self._outbox.put_nowait(None)

    async def _live(self) -> tuple[bool, TreadleError]:
        """The life of one process. Returns whether it was ever ready, and what it died of."""
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours, limit=READ_AHEAD)
        try:
            with theirs:
                process = self._process = await _spawn(theirs)
            try:
                writer.write(framed([self._load]))
                failed = await self._converse(reader, writer)
                was_ready, self._writer = self._writer is not None, None
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), CLOSE_S)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        finally:
            self._writer = None
            writer.close()
        return was_ready, _error_of(failed) if failed is not None else _death(process)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Failed | None:
        """Passes on what comes until no more does. Returns the last word of the process, if it had one."""
        while (batch := await _read(reader)) is not None:
            match batch:
                case (EngineInfo() as info,):
                    self.info, self._writer = info, writer
                    writer.write(framed(self._journal.replay(time.monotonic())))
                    self._settled.set()
                case (Failed() as failed,):
                    return failed
                case _:
                    now = time.monotonic()
                    events = (self._journal.came(event, now) for event in batch if isinstance(event, Event))
                    self._outbox.put_nowait(tuple(events))
        return None


def open_engine_process(
    model: str | Path, config: EngineConfig | None = None, limit: Restarts | None = None
) -> EngineProcess:
    """Starts a process that loads a model and runs its engine. Returns at once; see `EngineProcess.ready`.

    A known model must be in the cache. Closing the result, or the end of this process, ends that one.
    """
    return EngineProcess(str(model), config or EngineConfig(), limit or Restarts())


async def _spawn(theirs: socket.socket) -> Process:
    """A process that has the other end of a connection."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "treadle.runtime.engine.process",
        str(theirs.fileno()),
        stdin=DEVNULL,
        stdout=DEVNULL,
        pass_fds=(theirs.fileno(),),
        start_new_session=True,  # an interrupt of the owner's terminal is not for the engine
    )


async def _read(reader: asyncio.StreamReader) -> tuple[Message, ...] | None:
    try:
        length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
        return decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, OSError):
        return None


def _plain(config: EngineConfig) -> dict[str, object]:
    """The fields of a configuration as they go through the wire."""
    plain: dict[str, object] = msgspec.to_builtins(config, enc_hook=str)
    if config.learned is not None:
        plain["learned"] = str(Path(config.learned).absolute())
    return plain


def _refused(command: Command, reason: str) -> Event:
    subject = getattr(command, fields(command)[0].name)
    message = f"it cannot be sent to the engine: {reason}; use text that is Unicode, and numbers of 64 bits"
    if isinstance(command, SubmitCall):
        return CallFinished(subject, "error", Usage(), error="bad_text", message=message)
    return Rejected(subject, "bad_text", message)


def _error_of(failed: Failed) -> TreadleError:
    """The error that ended a process, of its own class if that is one of ours."""
    kind = getattr(errors, failed.kind, None)
    if isinstance(kind, type) and issubclass(kind, TreadleError):
        return kind(failed.message)
    return EngineClosedError(f"the engine failed: {failed.message}")


def _death(process: Process) -> TreadleError:
    status = process.returncode
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        hint = ", perhaps for want of memory: give it fewer pages" if name == "SIGKILL" else ""
        return EngineClosedError(f"the engine's process was killed by {name}{hint}")
    return EngineClosedError(f"the engine's process ended with status {status}")
