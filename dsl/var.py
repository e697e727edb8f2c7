"""Typed values that will exist."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeAlias, TypeVar, overload

from pydantic_core import to_json

from treadle.dsl.errors import NodeCancelled, VarAttributeError, VarUseError
from treadle.dsl.holes import tag
from treadle.dsl.location import Location, caller, caller_frame

if TYPE_CHECKING:
    from treadle.dsl.node import Node
    from treadle.dsl.program import Program

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Piece: TypeAlias = tuple[str, tuple[int, ...]]


class Signal:
    """Wakes those who wait."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] = []

    async def wait(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class Var(Generic[T_co]):
    """The value of a call or a tool, which may not exist yet. Calling an `@llm` function or a `@tool` gives one.

    Await it for the value, pass it to another call to make an edge of the graph, or stream its text::

        draft = write(topic)                    # Var[str]; nothing is waited for
        verdict = await review(draft)           # runs both
        async for text in draft.stream(): ...

    It is not the value: `if var`, `for x in var`, `var[0]`, `var == 1` and the like raise `VarUseError`.

    Attributes:
        node: The node of the graph that produces it.
        token_ids: What the model generated, exactly; None if that is not known.
    """

    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_done",
        "_error",
        "_finished",
        "_pieces",
        "_progress",
        "_text",
        "_value",
        "node",
        "stand_in",
        "token_ids",
    )

    def __init__(self, node: Node) -> None:
        self.node = node
        self.token_ids: tuple[int, ...] | None = None
        self.stand_in: Callable[[Location], Any] | None = None
        self._done = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._text: str | None = None
        self._pieces: list[Piece] = []
        self._finished = Signal()
        self._progress = Signal()
        self._callbacks: list[Callable[[Var[Any]], None]] = []

    # -- for everyone

    def __await__(self) -> Generator[Any, None, T_co]:
        if self.stand_in is not None:
            return self.stand_in(caller())  # type: ignore[no-any-return]
        while not self._done:
            yield from self._finished.wait().__await__()
        return self.value

    async def stream(self) -> AsyncIterator[str]:
        """The text as it is generated, from the beginning; of a value that is not streamed, the whole text at once."""
        async for text, _ in self.pieces():
            if text:
                yield text

    def cancel(self) -> None:
        """Stops the call. Whoever awaits the value gets `NodeCancelled`."""
        if self.fail(NodeCancelled(f"{self.node} was cancelled")):
            self.program.backend.cancel(self.node)

    @property
    def program(self) -> Program:
        """The program that it belongs to."""
        return self.node.program

    @property
    def is_done(self) -> bool:
        """Whether the value, or the failure, is there."""
        return self._done

    @property
    def error(self) -> BaseException | None:
        """The failure, if it failed."""
        return self._error

    @property
    def value(self) -> T_co:
        """The value of a variable that is done; raises its failure."""
        if not self._done:
            raise VarUseError(f"{caller()}: {self._called()} has no value yet: write `await {self._called()}`")
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[no-any-return]

    # -- for the backend

    def push(self, text: str, token_ids: tuple[int, ...] = ()) -> None:
        """Adds to the text of a value that is still being generated. What is pushed cannot be taken back."""
        if not self._done:
            self._pieces.append((text, token_ids))
            self._progress.wake()

    def resolve(self, value: Any, token_ids: tuple[int, ...] | None = None, text: str | None = None) -> bool:
        """Gives the value. `text` is how the model wrote it; what was pushed is a beginning of it.

        Returns False, changing nothing, if the variable was done already.
        """
        if self._done:
            return False
        self._value, self._text, self.token_ids = value, text, token_ids
        pushed = "".join(piece for piece, _ in self._pieces)
        full = self.value_text()
        if (full.startswith(pushed) and len(full) > len(pushed)) or not self._pieces:
            num_pushed = sum(len(ids) for _, ids in self._pieces)
            self._pieces.append((full[len(pushed) :], (token_ids or ())[num_pushed:]))
        self._finish()
        return True

    def fail(self, error: BaseException) -> bool:
        """Says that the value will not come. The error of an input is wrapped in a `NodeFailed` with its path.

        A tool call of a model turns its error into a value, which tells the model. Returns False, changing nothing, if
        the variable was done already.
        """
        if self._done:
            return False
        error = self.node.explain(error)
        message = self.node.recover(error)
        if message is not None:
            return self.resolve(message)
        self._error = error
        self._finish()
        return True

    async def pieces(self) -> AsyncIterator[Piece]:
        """`(text, token_ids)` as they come, from the first, for any number of consumers; raises the failure."""
        if self.stand_in is not None:
            self.stand_in(caller()).refuse("streamed")
        index = 0
        while True:
            while index < len(self._pieces):
                yield self._pieces[index]
                index += 1
            if self._done:
                break
            await self._progress.wait()
        if self._error is not None:
            raise self._error

    def value_text(self) -> str:
        """How the value is written into a prompt: as the model wrote it, else text as it is and the rest as JSON."""
        return self._text if self._text is not None else self.node.write(self._value)

    def on_done(self, callback: Callable[[Var[Any]], None]) -> None:
        """Calls back when the variable is done: at once, if it is."""
        if self._done:
            callback(self)
        else:
            self._callbacks.append(callback)

    def _finish(self) -> None:
        self._done = True
        self.node.finish(self._error)
        self._finished.wake()
        self._progress.wake()
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)

    # -- misuse

    def __str__(self) -> str:
        return tag(self) or repr(self)

    def __format__(self, spec: str) -> str:
        return tag(self, spec) or format(repr(self), spec)

    def __repr__(self) -> str:
        return f"<Var {self.node} {self.node.state}>"

    def __hash__(self) -> int:
        return id(self)

    def __bool__(self) -> NoReturn:
        self._misused("has no truth value yet", "if await {}")

    if not TYPE_CHECKING:  # to a checker these do not exist, so that it reports their use

        def __iter__(self) -> Iterator[Any]:
            self._misused("cannot be iterated over", "for item in await {}")

        def __getitem__(self, key: object) -> NoReturn:
            self._misused("cannot be indexed", "(await {})[...]")

        def __len__(self) -> int:
            self._misused("has no length yet", "len(await {})")

        def __contains__(self, item: object) -> bool:
            self._misused("cannot be searched", "item in await {}")

        def __eq__(self, other: object) -> bool:
            if isinstance(other, Var):
                return self is other
            self._misused("cannot be compared", "await {} == ...")

        def __getattr__(self, name: str) -> NoReturn:
            if name.startswith("__"):
                raise AttributeError(name)
            raise VarAttributeError(
                f"{caller()}: {self!r} is not its value and has no attribute {name!r}: "
                f"write `(await {self._called()}).{name}`"
            )

        def _operated(self, *others: object) -> NoReturn:
            self._misused("cannot be calculated with or compared", "await {}")

        __lt__ = __le__ = __gt__ = __ge__ = _operated
        __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _operated
        __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __neg__ = __abs__ = _operated
        __int__ = __float__ = __index__ = __round__ = _operated

    def _called(self) -> str:
        """What the user's code calls this variable, as far as can be told."""
        for name, value in caller_frame().f_locals.items():
            if value is self:
                return name
        return f"{self.node.name}(...)"

    def _misused(self, what: str, fix: str) -> NoReturn:
        raise VarUseError(f"{caller()}: {self!r} {what}: write `{fix.format(self._called())}`")


In: TypeAlias = T | Var[T]
"""A parameter that takes a value or a variable: `async def review(draft: In[str]) -> Review`."""


@overload
async def value(item: Var[T]) -> T: ...
@overload
async def value(item: In[T]) -> T: ...
async def value(item: In[T]) -> T:
    """The value of what may be a variable."""
    return await item if isinstance(item, Var) else item


def text_of(item: object) -> str:
    """A value as it is written into a prompt: text as it is, models and containers as compact JSON."""
    if isinstance(item, enum.Enum):
        item = item.value
    if isinstance(item, str):
        return str(item)
    return to_json(item, fallback=str).decode()
