"""Calls as a caller sees them: submit one, read its own stream, get a typed error if it fails."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator
from types import TracebackType
from typing import Any, TypeVar

from treadle.grammar import Constraint, constraint_to_json
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
    Decided,
    Decision,
    EndProgram,
    ErrorCode,
    Event,
    Hint,
    HintAnswered,
    Inspect,
    Inspected,
    OpenProgram,
    Prepare,
    Prepared,
    ProgramEnded,
    Rejected,
    SubmitCall,
    TokensOut,
    Watch,
)

T = TypeVar("T")
MAX_DECISIONS = 4096


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
        self._requests: dict[str, asyncio.Future[Any]] = {}
        self._watchers: list[asyncio.Queue[Decision | None]] = []
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

    async def ended(self) -> TreadleError:
        """Waits until the engine is gone for good. Returns what everybody is told from then on."""
        assert self._pump_task is not None
        await asyncio.wait([self._pump_task])
        assert self._failure is not None
        return self._failure

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

    def end_program(self, program_id: str) -> asyncio.Future[ProgramEnded]:
        """Ends a program, aborting its live calls, before anything that is sent later. Its account is to be awaited."""
        future: asyncio.Future[ProgramEnded] = asyncio.get_running_loop().create_future()
        self._programs[program_id] = future
        self.send(EndProgram(program_id))
        return future

    def submit(self, *calls: SubmitCall) -> list[CallStream]:
        """Submits calls in one batch, and returns a stream for each."""
        streams = [CallStream(self, call.call_id) for call in calls]
        self._calls.update({stream.call_id: stream for stream in streams})
        self.send(*calls)
        return streams

    async def prepare(self, constraint: Constraint, tenant: str = "") -> tuple[str, ...]:
        """Has the engine compile a grammar, so that a call of the tenant which has it begins at once.

        Returns JSON pointers of what the grammar does not guarantee. Raises `InvalidRequestError` with what is wrong,
        and `OverloadedError` where compiling takes too long: it goes on, so that a later attempt may find it done.
        """
        command = Prepare(self.new_id("request"), constraint_to_json(constraint), tenant)
        prepared: Prepared = await self.ask(command)
        if prepared.error is not None:
            raise InvalidRequestError(prepared.error)
        return prepared.unenforced

    async def inspect(self, subject: str | None = None) -> dict[str, Any]:
        """What the engine has and does, as `scheduler/inspection.py` describes it; one program in detail, if named."""
        command = Inspect(self.new_id("request"), subject)
        inspected: Inspected = await self.ask(command)
        return inspected.report

    async def decisions(self) -> AsyncGenerator[Decision, None]:
        """What the scheduler decides from now on. Ends with the session. A reader that is slow misses the oldest."""
        queue: asyncio.Queue[Decision | None] = asyncio.Queue(MAX_DECISIONS)
        if not self._watchers:
            self.send(Watch(True))
        self._watchers.append(queue)
        try:
            while (decision := await queue.get()) is not None:
                yield decision
        finally:
            self._watchers.remove(queue)
            if not self._watchers and self._failure is None:
                self.send(Watch(False))

    async def ask(self, command: Prepare | Inspect | Hint) -> Any:
        """Sends a command and returns the event that answers it. Its `request_id` must be new."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.send(command)
        self._requests[command.request_id] = future
        try:
            return await future
        finally:
            self._requests.pop(command.request_id, None)

    async def _pump(self) -> None:
        error: TreadleError = EngineClosedError("the engine ended before the call did")
        try:
            async for batch in self._client.events():
                for event in batch:
                    self._deliver(event)
        except EngineClosedError as reason:
            error = reason
        finally:
            self._fail_all(error)

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
                _resolve(self._programs.pop(event.program_id, None), event)
            case Prepared() | Inspected() | HintAnswered():
                _resolve(self._requests.pop(event.request_id, None), event)
            case Rejected():
                asked = self._requests if event.subject in self._requests else self._programs
                _refuse(asked.pop(event.subject, None), error_for(event.error, event.message))
            case Decided():
                for watcher, decision in itertools.product(self._watchers, event.decisions):
                    _put(watcher, decision)

    def _fail_all(self, error: TreadleError) -> None:
        self._failure = error
        for stream in self._calls.values():
            stream.put(error)
        for future in (*self._programs.values(), *self._requests.values()):
            _refuse(future, error)
        for watcher in self._watchers:
            _put(watcher, None)
        self._calls.clear()
        self._programs.clear()


def _resolve(future: asyncio.Future[T] | None, result: T) -> None:
    if future is not None and not future.done():
        future.set_result(result)


def _refuse(future: asyncio.Future[Any] | None, error: TreadleError) -> None:
    if future is not None and not future.done():
        future.set_exception(error)
        future.exception()  # whoever waited may be gone: that is no reason for a warning


def _put(watcher: asyncio.Queue[T], item: T) -> None:
    """Puts an item into a queue, at the cost of its oldest if it is full."""
    if watcher.full():
        watcher.get_nowait()
    watcher.put_nowait(item)
