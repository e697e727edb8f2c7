"""The seam between workflows and what runs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

from treadle.dsl.errors import NoBackendError
from treadle.dsl.location import caller

if TYPE_CHECKING:
    from treadle.dsl.node import Node
    from treadle.dsl.program import Program

_BACKEND: ContextVar[Backend | None] = ContextVar("treadle_backend", default=None)


class Backend(Protocol):
    """Runs programs. All its methods, and all methods of variables, are called on the thread of one event loop.

    What it does with a node::

        node.begin()                                    # state "running"
        prompt = await node.render()                    # llm: runs the body; a tool: `await node.ready_arguments()`
        node.output.push(text, token_ids)               # as they come, if it streams
        node.output.resolve(node.parse(text), token_ids, text)
        node.output.fail(error)                         # instead; the error of an input becomes `NodeFailed`
    """

    async def open_program(self, program: Program) -> None:
        """Begins a program. No node of it is started before this has returned."""

    def start(self, node: Node) -> None:
        """Takes a node, in order of declaration; must return at once, before anything that the node needs is there.

        Every node comes here: those of kind `gather` resolve themselves, and one whose output is already done (a tool
        call with arguments that do not fit) is only told, so that it can be declared.
        """

    def cancel(self, node: Node) -> None:
        """Stops a node, whose output has failed already. Unknown and finished nodes are fine."""

    async def close_program(self, program: Program, error: BaseException | None) -> None:
        """Ends a program: `error` is what its scope was left with. Returns when nothing of it runs any more.

        All its nodes are done or cancelled by now. May set `program.account`.
        """


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Runs the calls made in this scope, and in tasks begun in it, on `backend`."""
    token = _BACKEND.set(backend)
    try:
        yield
    finally:
        # Left in another context than it was entered in, as when a loop that ends closes what was left open: there it
        # was never set.
        with suppress(ValueError):
            _BACKEND.reset(token)


def current_backend() -> Backend:
    """The backend of this scope. Raises `NoBackendError` outside of any."""
    backend = _BACKEND.get()
    if backend is None:
        raise NoBackendError(
            f'{caller()}: no model is open here. Make the call inside `async with treadle.runtime.local("smollm2"):`'
        )
    return backend
