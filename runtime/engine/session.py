"""Calls as a caller sees them: submit one, read its own stream, get a typed error if it fails."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from types import TracebackType

from treadle.runtime.engine.client import EngineClient
from treadle.runtime.errors import (
    CallError,
    EngineClosedError,
    InvalidRequestError,
    OverloadedError,
    TreadleError,
)
from treadle.scheduler import (
    AbortCall,
    CallFinished,
    Command,
    EndProgram,
    ErrorCode,
    Event,
    OpenProgram,
    ProgramEnded,
    Rejected,
    SubmitCall,
    TokensOut,
)


def error_for(code: ErrorCode, message: str) -> TreadleError:
    """The exception for an error code of the scheduler."""
    if code == "engine":
        return CallError(message)
    if code == "overloaded":
        return OverloadedError(message)
    return InvalidRequestError(message)


class CallStream:
    """One call's events, in order: `async for` gives what it generates; `finished` is its end, from then on."""

    def __init__(self, session: Session, call_id: str) -> None:
        self.call_id = call_id
        self.finished: CallFinished | None = None
        self._session = session
        self._queue: asyncio.Queue[TokensOut | CallFinished | TreadleError] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[TokensOut]:
        """Yields tokens until the call ends. Raises `InvalidRequestError`, `OverloadedError`, `CallError` or
        `EngineClosedError` if it fails; an aborted call just ends. Leaving the loop early does not abort it."""
        while self.finished is None:
            event = await self._queue.get()
            if isinstance(event, TreadleError):
                raise event
            if isinstance(event, TokensOut):
                yield event
                continue
            self.finished = event
            if event.error is not None:
                raise error_for(event.error, event.message)

    def abort(self) -> None:
        """Ends the call, at any moment; the stream ends soon after. An ended call stays as it is."""
        if self._session.is_live(self.call_id):
            self._session.send(AbortCall(self.call_id))

    def put(self, event: TokensOut | CallFinished | TreadleError) -> None:
        """For the session: the call's next event."""
        self._queue.put_nowait(event)


class Session:
    """Hands the events of an engine to the calls and programs that they belong to. Use as `async with`."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._calls: dict[str, CallStream] = {}
        self._programs: dict[str, asyncio.Future[ProgramEnded]] = {}
        self._ids = itertools.count(1)
        self._unsent: list[Command] = []
        self.tokens_generated = 0
        self._failure: TreadleError | None = None
        self._pump_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Session:
        self._pump_task = asyncio.create_task(self._pump(), name="treadle-session")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._pump_task is not None
        self._flush()
        self._pump_task.cancel()
        await asyncio.gather(self._pump_task, return_exceptions=True)
        self._fail_all(EngineClosedError("the session was closed before the call ended"))

    def new_id(self, prefix: str) -> str:
        """An id that this session has not used."""
        return f"{prefix}-{next(self._ids)}"

    def is_live(self, call_id: str) -> bool:
        """Whether the call was submitted and has not ended."""
        return call_id in self._calls

    def send(self, *commands: Command) -> None:
        """Sends commands, in order. Raises `EngineClosedError` if the engine is gone.

        What is sent in one turn of the event loop reaches the engine at once, so that one step begins with all of it.
        """
        if self._failure is not None:
            raise self._failure
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent += commands

    def _flush(self) -> None:
        commands, self._unsent = self._unsent, []
        if commands:
            with contextlib.suppress(EngineClosedError):  # the pump tells everybody who waits
                self._client.send(commands)

    def open_program(self, kind: str = "", tenant: str = "") -> str:
        """Begins a program and returns its id."""
        program_id = self.new_id("program")
        self.send(OpenProgram(program_id, kind, tenant))
        return program_id

    async def end_program(self, program_id: str) -> ProgramEnded:
        """Ends a program, aborting its live calls, and returns its account."""
        future: asyncio.Future[ProgramEnded] = asyncio.get_running_loop().create_future()
        self._programs[program_id] = future
        self.send(EndProgram(program_id))
        return await future

    def submit(self, *calls: SubmitCall) -> list[CallStream]:
        """Submits calls in one batch, and returns a stream for each."""
        streams = [CallStream(self, call.call_id) for call in calls]
        self._calls.update({stream.call_id: stream for stream in streams})
        self.send(*calls)
        return streams

    async def _pump(self) -> None:
        try:
            async for batch in self._client.events():
                for event in batch:
                    self._deliver(event)
        finally:
            self._fail_all(EngineClosedError("the engine ended before the call did"))

    def _deliver(self, event: Event) -> None:
        match event:
            case TokensOut():
                self.tokens_generated += len(event.token_ids)
                if event.call_id in self._calls:
                    self._calls[event.call_id].put(event)
            case CallFinished():
                if event.call_id in self._calls:
                    self._calls.pop(event.call_id).put(event)
            case ProgramEnded():
                future = self._programs.pop(event.program_id, None)
                if future is not None and not future.done():
                    future.set_result(event)
            case Rejected():
                future = self._programs.pop(event.subject, None)
                if future is not None and not future.done():
                    future.set_exception(error_for(event.error, event.message))

    def _fail_all(self, error: TreadleError) -> None:
        self._failure = error
        for stream in self._calls.values():
            stream.put(error)
        for future in self._programs.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever waited may be gone: that is no reason for a warning
        self._calls.clear()
        self._programs.clear()
