"""Runs programs: every node of a graph as a task, model calls on the engine, tools beside it."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pydantic_core import to_json

from treadle.dsl.errors import NodeCancelled, ToolError, ToolTimeout
from treadle.dsl.node import CallNode, Node, ToolNode
from treadle.dsl.program import Objective, Program
from treadle.dsl.var import Var
from treadle.grammar.compiler import Compiler
from treadle.runtime.engine.session import Session
from treadle.runtime.errors import EngineClosedError
from treadle.runtime.executor.account import Account
from treadle.runtime.executor.calls import CallRunner
from treadle.runtime.executor.threads import ToolThreads
from treadle.runtime.text.tokenizer import Tokenizer
from treadle.scheduler import DUE_S, DeclareNode, OpenProgram, ProgramEnded, Resume, Wait

MAX_PROGRAMS = 1024
MAX_RESULT_BYTES = 256 * 1024
RETRY_PAUSE_S = 0.1
DUE_BY_OBJECTIVE_S: Mapping[Objective, float] = {"latency": DUE_S, "throughput": 3600.0}
"""When programs should be over, from their beginning, if they have no deadline before that."""


class Executor:
    """The `Backend` of programs on an engine of this process.

    The scheduler is told the whole graph as it grows: programs, nodes and edges, when a tool runs and when it has
    ended. Variables and their values stay here.

    Attributes:
        programs: The programs opened last, those that have ended included.
        watchers: Called with each node that begins or ends, on the loop's thread.
    """

    def __init__(self, model: str, session: Session, tokenizer: Tokenizer, compiler: Compiler) -> None:
        self.programs: deque[Program] = deque(maxlen=MAX_PROGRAMS)
        self.watchers: list[Callable[[Node], None]] = []
        self._session = session
        self._calls = CallRunner(model, session, tokenizer, compiler)
        self._threads = ToolThreads()
        self._limits: dict[Any, asyncio.Semaphore] = {}
        self._tasks: dict[Node, asyncio.Task[None]] = {}
        self._open: dict[str, Program] = {}

    async def open_program(self, program: Program) -> None:
        """Tells the scheduler that the program begins."""
        due_s = min(DUE_BY_OBJECTIVE_S[program.objective], math.inf if program.remaining is None else program.remaining)
        self._session.send(OpenProgram(program.id, program.name, program.tenant, program.priority, due_s))
        self.programs.append(program)
        self._open[program.id] = program

    def start(self, node: Node) -> None:
        """Declares a node and, unless it resolves itself, begins to work on it."""
        self._declare(node)
        node.output.on_done(partial(self._ended, node))
        if node.output.is_done or not isinstance(node, (CallNode, ToolNode)):
            return
        task = asyncio.create_task(self._run(node), name=f"treadle {node.program.id}/{node.id}")
        self._tasks[node] = task
        task.add_done_callback(lambda _: self._tasks.pop(node, None))

    def cancel(self, node: Node) -> None:
        """Stops a node's task; the engine's call ends with it."""
        task = self._tasks.get(node)
        if task is not None:
            task.cancel()

    async def close_program(self, program: Program, error: BaseException | None) -> None:
        """Waits until nothing of the program runs, ends it in the scheduler, and sets `program.account`."""
        tasks = [task for node, task in self._tasks.items() if node.program is program]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            program.account = self._account(program, await self._session.end_program(program.id))
        except EngineClosedError:
            return  # there is no engine left to give an account
        finally:
            self._open.pop(program.id, None)

    def _account(self, program: Program, ended: ProgramEnded) -> Account:
        nodes = [node for node in program.graph.nodes() if node.program is program]
        tools = [node for node in nodes if isinstance(node, ToolNode) and node.started_at is not None]
        leads = [
            node.caller.finished_at - node.started_at
            for node in tools
            if node.started_at is not None and node.caller is not None and node.caller.finished_at is not None
        ]
        return Account.of(ended, len(tools), max([0.0, *leads]))

    async def close(self) -> None:
        """Ends every program that is still open."""
        while self._open:
            program_id, program = next(iter(self._open.items()))
            await program.close()
            self._open.pop(program_id, None)

    def _declare(self, node: Node) -> None:
        inputs = tuple(source.id for source in node.inputs if source.program is node.program)
        extends = node.extends.id if node.extends is not None and node.extends.program is node.program else None
        typical = node.tool.typical if isinstance(node, ToolNode) else None
        self._session.send(
            DeclareNode(node.program.id, node.id, node.kind, node.name, inputs, extends, node.group, typical)
        )

    def _ended(self, node: Node, _: Var[Any]) -> None:
        self._tell(node)
        with contextlib.suppress(EngineClosedError):
            self._session.send(Resume(node.program.id, node.id))

    def _tell(self, node: Node) -> None:
        for watcher in self.watchers:
            watcher(node)

    async def _run(self, node: CallNode | ToolNode) -> None:
        node.begin()
        self._tell(node)
        try:
            if isinstance(node, CallNode):
                await self._calls.run(node)
                self._declare(node)
            else:
                await self._run_tool(node)
        except asyncio.CancelledError:
            node.output.fail(NodeCancelled(f"{node} was cancelled"))
            raise
        except Exception as error:
            node.output.fail(error)

    async def _run_tool(self, node: ToolNode) -> None:
        arguments = await node.ready_arguments()
        tool = node.tool
        limit = self._limits.setdefault(tool, asyncio.Semaphore(tool.concurrency)) if tool.concurrency else None
        for attempt in range(tool.retries + 1):
            try:
                if limit is None:
                    result = await self._run_once(node, arguments)
                else:
                    async with limit:
                        result = await self._run_once(node, arguments)
            except ToolError:
                if attempt == tool.retries:
                    raise
                await asyncio.sleep(RETRY_PAUSE_S * 2**attempt)
            else:
                node.output.resolve(result)
                return

    async def _run_once(self, node: ToolNode, arguments: dict[str, Any]) -> Any:
        tool = node.tool
        self._session.send(Wait(node.program.id, node.id))
        try:
            async with asyncio.timeout(tool.timeout) as limit:
                result = await node.run(arguments, self._threads.run)
        except TimeoutError as error:
            if limit.expired():
                raise ToolTimeout(f"{tool.name} took longer than its {tool.timeout:g} s") from error
            raise
        return checked_result(tool.name, result)


def checked_result(name: str, result: Any) -> Any:
    """A tool's result, if it can be written into a prompt. Raises `ToolError` otherwise."""
    try:
        size = len(result.encode() if isinstance(result, str) else to_json(result))
    except (ValueError, RecursionError) as error:
        reason = f"{name} returned a {type(result).__name__} that cannot be written as JSON ({error})"
        raise ToolError(f"{reason}; return text, numbers, lists, dicts, dataclasses or pydantic models") from error
    if size > MAX_RESULT_BYTES:
        raise ToolError(f"{name} returned {size:,} bytes; return at most {MAX_RESULT_BYTES:,}, such as a part of it")
    return result
