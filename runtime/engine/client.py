"""How commands reach an engine and events come back, wherever the engine runs."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from treadle.runtime.errors import EngineClosedError
from treadle.scheduler import Command, Event, Prepare

if TYPE_CHECKING:
    from treadle.runtime.engine.engine import Engine


class EngineClient(Protocol):
    """The way to an engine: in a thread, in another process, in a simulator or on another machine."""

    def send(self, commands: Sequence[Command]) -> None:
        """Hands over commands, in order. Returns at once; raises `EngineClosedError` if the engine is gone."""
        ...

    def events(self) -> AsyncIterator[tuple[Event, ...]]:
        """What happened, a batch for each step. Ends when the engine does. Only one reader at a time."""
        ...


class EngineThread:
    """A thread that turns an engine. Any thread may `send`; batches of events are published from more than one.

    Args:
        publish: Called with each batch, and with None at the end.
    """

    def __init__(self, engine: Engine, publish: Callable[[tuple[Event, ...] | None], object]) -> None:
        self.failure: BaseException | None = None
        self.closed = False
        self._engine = engine
        self._publish = publish
        self._inbox: queue.SimpleQueue[Sequence[Command] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="treadle-engine", daemon=True)
        self._thread.start()

    def send(self, commands: Sequence[Command]) -> None:
        """Hands over commands for the next turn of the loop."""
        self._inbox.put(commands)

    def close(self, timeout: float) -> None:
        """Stops the thread after the step that it is in. Calls that have not ended get no further event."""
        self.closed = True
        self._inbox.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            idle = False
            while (events := self._receive(wait=idle)) is not None:
                stepped = self._engine.step()
                idle = stepped is None
                events += stepped or ()
                decided = self._engine.decided()
                if decided is not None:
                    events.append(decided)
                if events:
                    self._publish(tuple(events))
            self._engine.close()
        except BaseException as error:
            self.failure = error
        finally:
            self.closed = True
            self._publish(None)

    def _receive(self, *, wait: bool) -> list[Event] | None:
        """Applies the commands that have come, waiting for the first if there is nothing else to do; None to stop."""
        events: list[Event] = []
        while wait and self._inbox.empty() and self._engine.touch_ahead():
            pass
        while wait or not self._inbox.empty():
            commands = self._inbox.get()
            if commands is None:
                return None
            for command in commands:
                if isinstance(command, Prepare):
                    self._engine.prepare(command, lambda prepared: self._publish((prepared,)))
            events += self._engine.apply([command for command in commands if not isinstance(command, Prepare)])
            wait = False
        return events


class ThreadedEngine:
    """An engine turned by a thread of this process. Any thread may `send`; one event loop reads `events`."""

    def __init__(self, engine: Engine) -> None:
        self.max_context = engine.scheduler.limits.max_context
        self.max_calls = engine.scheduler.config.max_calls
        self._engine = engine
        self._outbox: deque[tuple[Event, ...] | None] = deque()
        self._wake: Callable[[], object] = lambda: None
        self._thread = EngineThread(engine, self._deliver)

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine, if that was not `close`."""
        return self._thread.failure

    def send(self, commands: Sequence[Command]) -> None:
        if self._thread.closed:
            raise EngineClosedError("the engine is closed; open a new one") from self.failure
        self._thread.send(commands)

    async def events(self) -> AsyncIterator[tuple[Event, ...]]:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the reader's loop may have been closed meanwhile
                loop.call_soon_threadsafe(woken.set)

        self._wake = wake
        while True:
            woken.clear()
            while self._outbox:
                batch = self._outbox.popleft()
                if batch is None and self.failure is not None:
                    reason = f"{type(self.failure).__name__}: {self.failure}"
                    raise EngineClosedError(f"the engine failed: {reason}") from self.failure
                if batch is None:
                    return
                yield batch
            await woken.wait()

    def close(self, timeout: float = 10.0) -> None:
        """Stops the thread after the step that it is in. Calls that have not ended get no further event."""
        self._thread.close(timeout)

    def _deliver(self, batch: tuple[Event, ...] | None) -> None:
        self._outbox.append(batch)
        self._wake()
