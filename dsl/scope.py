"""`program`: where a workflow begins and ends."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, overload

from treadle.dsl.backend import current_backend
from treadle.dsl.duration import Duration, seconds
from treadle.dsl.errors import DeadlineExceeded, DSLError
from treadle.dsl.location import caller
from treadle.dsl.program import PROGRAM, Objective, Program

P = ParamSpec("P")
T = TypeVar("T")
Workflow = Callable[P, Coroutine[Any, Any, T]]


@dataclass(frozen=True, slots=True)
class _Options:
    name: str | None
    deadline: float | None
    priority: int | None
    objective: Objective | None
    budget_tokens: int | None
    tenant: str | None


class ProgramScope:
    """What `program(...)` gives: the scope of one program, or a decorator. Used once as a scope."""

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._program: Program | None = None
        self._token: contextvars.Token[Program | None] | None = None
        self._timeout: asyncio.Timeout | None = None

    def __call__(self, workflow: Workflow[P, T]) -> Workflow[P, T]:
        options = self._options

        @functools.wraps(workflow)
        async def run(*args: P.args, **kwargs: P.kwargs) -> T:
            scope = ProgramScope(options)
            scope._default_name = workflow.__name__
            async with scope as program:
                result = await workflow(*args, **kwargs)
                program.result = result
                return result

        return run

    _default_name = "program"

    async def __aenter__(self) -> Program:
        if self._program is not None:
            raise DSLError(f"{caller()}: a program(...) is one scope; make another for the next run")
        options, parent = self._options, PROGRAM.get()
        program = self._program = Program(
            options.name or self._default_name,
            parent.backend if parent else current_backend(),
            parent=parent,
            tenant=options.tenant,
            deadline=None if options.deadline is None else time.monotonic() + options.deadline,
            priority=options.priority,
            objective=options.objective,
            budget_tokens=options.budget_tokens,
        )
        remaining = program.remaining
        self._timeout = asyncio.timeout(None if remaining is None else max(remaining, 0.0))
        await program.open()
        await self._timeout.__aenter__()
        self._token = PROGRAM.set(program)
        return program

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._program is not None and self._token is not None and self._timeout is not None
        PROGRAM.reset(self._token)
        late: DeadlineExceeded | None = None
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            late = DeadlineExceeded(f"program {self._program.name!r} did not end before its deadline")
        await self._program.close(late or error)
        if late is not None:
            raise late from error


@overload
def program(name: Workflow[P, T], /) -> Workflow[P, T]: ...
@overload
def program(
    name: str | None = None,
    *,
    deadline: Duration | None = None,
    priority: int | None = None,
    objective: Objective | None = None,
    budget_tokens: int | None = None,
    tenant: str | None = None,
) -> ProgramScope: ...
def program(
    name: Workflow[P, T] | str | None = None,
    *,
    deadline: Duration | None = None,
    priority: int | None = None,
    objective: Objective | None = None,
    budget_tokens: int | None = None,
    tenant: str | None = None,
) -> Workflow[P, T] | ProgramScope:
    """Makes the calls in a scope, or of a function, one program.

    ::

        async with program("report", deadline=20) as p:
            draft = write(topic)
            verdict = await review(draft)
        print(p.account)

        @program(deadline="20s")
        async def report(topic: str) -> str: ...

    Leaving the scope cancels what still runs and waits for its end. A scope inside another can only tighten its
    deadline and its budget, and takes over what it does not say.

    Args:
        name: The kind of program, the same for all runs of one workflow; of a function, its name.
        deadline: From now until it must be over: seconds, or text such as "20s". Then everything in it is cancelled
            and the scope raises `DeadlineExceeded`. What has less time left goes before what has more.
        priority: Higher goes first, whatever is older.
        objective: `latency` (the default), or `throughput` for work that may wait: it lets others pass for an hour.
        budget_tokens: Most tokens that all its calls may use, prompts included.
        tenant: Who pays for it.
    """
    if callable(name):
        return ProgramScope(_Options(None, None, None, None, None, None))(name)
    limit = None if deadline is None else seconds(deadline)
    return ProgramScope(_Options(name, limit, priority, objective, budget_tokens, tenant))
