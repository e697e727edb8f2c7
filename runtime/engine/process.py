"""The engine's own process: `python -m treadle.runtime.engine.process FD`, started by `EngineProcess`.

::

    main thread     reads commands from the socket, and ends the process when no more can come
    load thread     loads the model, says what engine it makes, and starts the next
    engine thread   turns the engine, and writes events to the socket

It lives as long as the other end of its socket: whatever becomes of the owner, nothing of the engine is left behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from treadle.runtime.engine.client import EngineThread
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.engine.wire import LENGTH_BYTES, Failed, Load, Message, decode, framed
from treadle.runtime.errors import TreadleError
from treadle.scheduler import Command, Event
from treadle.scheduler.config import Costs

if TYPE_CHECKING:
    from treadle.runtime.engine.engine import Engine

SWITCH_S = 0.0005
"""How long a thread may compile a grammar before that of the engine, which waits for the interpreter, gets its turn."""
CLOSE_S = 5.0
"""How long the step may take that the engine is in when it is to end."""


class Connection:
    """A blocking socket that carries batches of messages. Any thread may write."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._writing = threading.Lock()

    def write(self, batch: Sequence[Message]) -> None:
        """Sends a batch. If nobody listens any more, the reader learns of it too."""
        data = framed(batch)
        with self._writing, contextlib.suppress(OSError):
            self._socket.sendall(data)

    def read(self) -> tuple[Message, ...] | None:
        """The next batch; None if there is none, because the other end is closed."""
        length = self._exactly(LENGTH_BYTES)
        data = self._exactly(int.from_bytes(length, "big")) if length is not None else None
        return decode(bytes(data)) if data is not None else None

    def _exactly(self, size: int) -> bytearray | None:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            try:
                count = self._socket.recv_into(view)
            except OSError:
                return None
            if not count:
                return None
            view = view[count:]
        return data


class Host:
    """Loads one model and runs its engine for whoever holds the other end of a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._engine: EngineThread | None = None

    def run(self) -> None:
        """Returns when the other end is closed."""
        first = self._connection.read()
        if first is None:
            return
        (load,) = first
        assert isinstance(load, Load)
        threading.Thread(target=self._load, args=(load,), name="treadle-load", daemon=True).start()
        while (batch := self._connection.read()) is not None:
            assert self._engine is not None, "commands before the engine was ready"
            self._engine.send([command for command in batch if isinstance(command, Command)])
        if self._engine is not None:
            self._engine.close(CLOSE_S)

    def _load(self, load: Load) -> None:
        try:
            engine = _open(load)
        except BaseException as error:
            self._fail(error)
        self._engine = EngineThread(engine, self._publish)
        self._connection.write([engine.info])

    def _publish(self, batch: tuple[Event, ...] | None) -> None:
        if batch is not None:
            self._connection.write(batch)
        elif self._engine is not None and self._engine.failure is not None:
            self._fail(self._engine.failure)

    def _fail(self, error: BaseException) -> None:
        """Says why there is no engine any more, and ends the process."""
        message = str(error) if isinstance(error, TreadleError) else f"{type(error).__name__}: {error}"
        self._connection.write([Failed(type(error).__name__, message)])
        os._exit(1)


def _open(load: Load) -> Engine:
    from treadle.runtime.engine.build import build_engine
    from treadle.runtime.loading import open_model

    return build_engine(*open_model(load.model, pull=False), config_from(load.config))


def config_from(fields: dict[str, Any]) -> EngineConfig:
    """The configuration that a `Load` carries."""
    costs = fields["costs"]
    return EngineConfig(**{**fields, "costs": None if costs is None else Costs(**costs)})


def main(descriptor: str) -> None:
    """The life of the process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # when the engine ends is for its owner to say
    sys.setswitchinterval(SWITCH_S)
    Host(Connection(socket.socket(fileno=int(descriptor)))).run()
    os._exit(0)  # a thread that still computes must not hold the process


if __name__ == "__main__":
    main(sys.argv[1])
