"""The graph of a workflow before it runs."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from treadle.dsl.backend import use_backend
from treadle.dsl.graph import Graph
from treadle.dsl.location import Location
from treadle.dsl.node import Node
from treadle.dsl.program import PROGRAM
from treadle.dsl.scope import program
from treadle.dsl.standin import StandIn

if TYPE_CHECKING:
    from treadle.dsl.program import Program

P = ParamSpec("P")
T = TypeVar("T")


class TracingBackend:
    """Runs nothing: awaiting a variable gives a `StandIn`."""

    def __init__(self, name: str) -> None:
        self.graph = Graph(name)

    async def open_program(self, program: Program) -> None:
        pass

    def start(self, node: Node) -> None:
        self.graph.add(node)

        def stand_in(awaited: Location) -> Any:
            if node.kind == "gather":
                return tuple(StandIn(each.output, awaited) for each in node.inputs)
            return StandIn(node.output, awaited)

        node.output.stand_in = stand_in

    def cancel(self, node: Node) -> None:
        pass

    async def close_program(self, program: Program, error: BaseException | None) -> None:
        pass


def compile(workflow: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> Graph:
    """The graph of a workflow, without running a call or a tool.

    ::

        print(compile(report, "looms").mermaid())

    The workflow's own code runs, the bodies of its calls do not: variables that only a body knows are not in the
    graph. A value that was awaited may be passed on and returned.

    Raises `CompileError`, which names the lines, if the workflow uses a value in any other way: then its graph depends
    on the values.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.Context().run, _trace, workflow, args, kwargs).result()


def _trace(workflow: Callable[..., Coroutine[Any, Any, Any]], args: Any, kwargs: Any) -> Graph:
    name = getattr(workflow, "__name__", "workflow")
    backend = TracingBackend(name)

    async def run() -> None:
        PROGRAM.set(None)
        with use_backend(backend):
            async with program(name):
                await workflow(*args, **kwargs)

    asyncio.run(run())
    for node in backend.graph.nodes():
        node.state, node.error, node.finished_at = "pending", None, None
    return backend.graph
