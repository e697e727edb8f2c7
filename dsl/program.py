"""Programs: the state of one run of a workflow. `scope.py` has what people write."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, Literal, TypeAlias

from treadle.dsl.backend import Backend, current_backend
from treadle.dsl.errors import DeadlineExceeded, DSLError, ForeignVarError, ProgramCancelled, ProgramEndedError
from treadle.dsl.graph import Graph
from treadle.dsl.location import caller
from treadle.dsl.node import Node
from treadle.dsl.var import Signal, Var

Objective: TypeAlias = Literal["latency", "throughput"]

PROGRAM: ContextVar[Program | None] = ContextVar("treadle_program", default=None)


class Program:
    """One run of a workflow.

    Attributes:
        id: Unique.
        name: The kind of program; runs of one workflow share it.
        tenant: Who pays for it.
        deadline: When it must be over, in seconds of `time.monotonic`; None for never.
        priority: Higher goes first.
        objective: What matters: `latency` or `throughput`.
        budget_tokens: Most tokens that all its calls may use, prompts included.
        parent: The program in whose scope it was opened.
        implicit: It was opened by a call outside of any scope, and ends when nothing of it runs any more.
        graph: Its calls and tools.
        backend: What runs it.
        nonce: Marks its holes. A secret: never show it.
        account: Set by the backend when the program ends: where time and tokens went.
        result: What a function under `@program` returned.
        ended: Its scope has been left.
    """

    def __init__(
        self,
        name: str,
        backend: Backend,
        *,
        parent: Program | None = None,
        tenant: str | None = None,
        deadline: float | None = None,
        priority: int | None = None,
        objective: Objective | None = None,
        budget_tokens: int | None = None,
        implicit: bool = False,
    ) -> None:
        if parent and tenant not in (None, parent.tenant):
            raise DSLError(
                f"{caller()}: program {name!r} is for tenant {tenant!r}, "
                f"but {parent.name!r} around it is for {parent.tenant!r}; open it outside"
            )
        self.name: str = name
        self.id = f"{name}-{secrets.token_hex(8)}"
        self.nonce = secrets.token_hex(16)
        self.backend = backend
        self.parent = parent
        self.tenant: str = tenant or (parent.tenant if parent else "")
        self.deadline: float | None = _tighter(deadline, parent.deadline if parent else None)
        self.budget_tokens: int | None = _tighter(budget_tokens, parent.budget_tokens if parent else None)
        self.priority: int = priority if priority is not None else parent.priority if parent else 0
        self.objective: Objective = objective or (parent.objective if parent else "latency")
        self.implicit = implicit
        self.graph = Graph(name)
        self.account: Any = None
        self.result: Any = None
        self.ended = False
        self.children: list[Program] = []
        self._nodes: dict[str, Node] = {}
        self._live: dict[Node, None] = {}
        self._idle = Signal()
        self._opened = False
        self._queue: list[Node] = []
        self._numbers: itertools.count[int] = parent._numbers if parent else itertools.count(1)
        self._groups: itertools.count[int] = parent._groups if parent else itertools.count(1)
        self._task: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._closed = False
        if parent:
            parent.children.append(self)

    @property
    def ancestors(self) -> tuple[Program, ...]:
        """The programs around it, the innermost first."""
        return (self.parent, *self.parent.ancestors) if self.parent else ()

    @property
    def root(self) -> Program:
        """The outermost program around it; itself, if there is none."""
        return self.parent.root if self.parent else self

    @property
    def remaining(self) -> float | None:
        """Seconds until the deadline."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def new_node_id(self) -> str:
        return f"n{next(self._numbers)}"

    def new_group_id(self) -> str:
        return f"g{next(self._groups)}"

    def find(self, node_id: str) -> Node | None:
        """A node of this program by id."""
        return self._nodes.get(node_id)

    def check_input(self, var: Var[Any]) -> None:
        """Raises `ForeignVarError` for a variable that calls of this program may not take."""
        other = var.program
        if other is self or other in self.ancestors or (other.implicit and other.ended):
            return
        fix = (
            "Make both calls inside one `async with program(...)`, or await the variable and pass its value"
            if other.implicit
            else f"Await it inside the scope of {other.name!r} and pass its value"
        )
        raise ForeignVarError(
            f"{caller()}: {var!r} belongs to program {other.id!r} and cannot be passed to {self.id!r}. {fix}"
        )

    def declare(self, node: Node) -> None:
        """Adds a node to the graph and gives it to the backend.

        Raises `ProgramEndedError`, or `ForeignVarError` for an input of another program.
        """
        if self.ended:
            raise ProgramEndedError(
                f"{node} was called in program {self.name!r} after its scope was left; call it inside, or in a new one"
            )
        for source in node.inputs:
            if source is not node.extends:
                self.check_input(source.output)
        self._nodes[node.id] = node
        self.graph.add(node)
        self._live[node] = None
        node.output.on_done(self._on_done)
        if self._opened:
            self.backend.start(node)
        else:
            self._queue.append(node)

    async def open(self) -> None:
        """Opens it in the backend and starts what has been declared. If the backend raises, the program has ended."""
        try:
            await self.backend.open_program(self)
        except BaseException:
            self.ended = True
            raise
        self._opened = True
        queue, self._queue = self._queue, []
        for node in queue:
            self.backend.start(node)

    async def close(self, error: BaseException | None = None) -> None:
        """Cancels what still runs, here and in the programs inside, and returns when it has ended.

        A cancellation that comes meanwhile is raised at the end. Closing again waits for the end too, and begins once
        more if the first attempt was cut short, as by the end of its event loop.
        """
        if self._closed:
            return
        self.ended = True
        begins = self._closing is None or self._closing.done()
        if self._closing is None or begins:
            self._closing = asyncio.ensure_future(self._close(error))
        closing = self._closing
        cancelled: asyncio.CancelledError | None = None
        while not closing.done():
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError as cancellation:
                if closing.cancelled():
                    raise
                cancelled = cancellation
            except BaseException:
                if not closing.done():
                    raise
        if cancelled is not None:
            raise cancelled
        if begins:
            closing.result()

    async def _close(self, error: BaseException | None) -> None:
        reason = (
            error
            if isinstance(error, DeadlineExceeded)
            else ProgramCancelled(f"program {self.name!r} ended before this value was there")
        )
        for child in self.children:
            await child.close(reason)
        for node in list(self._live):
            node.output.fail(reason)
            self.backend.cancel(node)
        if self._opened:
            await self.backend.close_program(self, error)
        self._closed = True

    def run_implicitly(self) -> None:
        """Opens it in a task of its own, which closes it when nothing of it runs any more."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"treadle program {self.id}")

    async def _run(self) -> None:
        try:
            await self.open()
        except Exception as error:
            for node in list(self._live):
                node.output.fail(error)
            return
        while self._live:
            await self._idle.wait()
        await self.close()

    def _on_done(self, var: Var[Any]) -> None:
        self._live.pop(var.node, None)
        if not self._live:
            self._idle.wake()


def current_program() -> Program | None:
    """The program of the scope that is running, if any."""
    return PROGRAM.get()


def program_for(name: str, inputs: Iterable[Var[Any]]) -> Program:
    """The program that a call joins: that of the scope, else that of its inputs, else an implicit one of its own.

    Raises `NoBackendError`, or `ForeignVarError` when the inputs are of several programs.
    """
    program = PROGRAM.get()
    if program is not None:
        return program
    for var in inputs:
        if var.program.implicit and not var.program.ended:
            return var.program
    program = Program(name, current_backend(), implicit=True)
    program.run_implicitly()
    return program


def _tighter(mine: Any, outer: Any) -> Any:
    return min((limit for limit in (mine, outer) if limit is not None), default=None)
