"""Many variables at once."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

from treadle.dsl.standin import StandIn
from treadle.dsl.var import Signal, Var

T_co = TypeVar("T_co", covariant=True)


class VarList(Generic[T_co]):
    """The variables of a fan-out, in order. Await it for the list of values; in a prompt it is their lines.

    ::

        notes = answer.map(questions)           # VarList[str]
        report = write(topic, notes)            # an edge from each note
        texts = await notes                     # list[str]

    Its length is known, so it can be iterated over and indexed; the items are variables.
    """

    def __init__(self, variables: Sequence[Var[T_co]]) -> None:
        self._vars = tuple(variables)

    def __await__(self) -> Generator[Any, None, list[T_co]]:
        return settled(self._vars).__await__()

    def __len__(self) -> int:
        return len(self._vars)

    def __iter__(self) -> Iterator[Var[T_co]]:
        return iter(self._vars)

    @overload
    def __getitem__(self, index: int) -> Var[T_co]: ...
    @overload
    def __getitem__(self, index: slice) -> VarList[T_co]: ...
    def __getitem__(self, index: int | slice) -> Var[T_co] | VarList[T_co]:
        return VarList(self._vars[index]) if isinstance(index, slice) else self._vars[index]

    def __str__(self) -> str:
        return "\n".join(str(var) for var in self._vars)

    def __repr__(self) -> str:
        return f"VarList({list(self._vars)!r})"


async def settled(variables: Sequence[Var[Any]]) -> list[Any]:
    """The values in order. Raises the first failure as soon as it happens."""
    if any(var.stand_in is not None for var in variables):
        return [await var for var in variables]
    waiting = len(variables)
    failures: list[Var[Any]] = []
    changed = Signal()

    def count(var: Var[Any]) -> None:
        nonlocal waiting
        waiting -= 1
        if var.error is not None:
            failures.append(var)
        changed.wake()

    for var in variables:
        var.on_done(count)
    while waiting and not failures:
        await changed.wait()
    if failures:
        return [failures[0].value]
    return [var.value for var in variables]


def find_vars(item: object) -> Iterator[Var[Any]]:
    """The variables in a value: itself, or inside of lists, tuples, dicts and sets."""
    if isinstance(item, Var):
        yield item
    elif isinstance(item, StandIn):
        yield item.var
    elif isinstance(item, dict):
        for part in item.values():
            yield from find_vars(part)
    elif isinstance(item, (list, tuple, set, frozenset, VarList)):
        for part in item:
            yield from find_vars(part)


async def replace_vars(item: Any) -> Any:
    """The same value with each variable replaced by its value. Raises the failure of a variable."""
    if isinstance(item, Var):
        return await item
    if isinstance(item, VarList):
        return await item
    if next(find_vars(item), None) is None:
        return item
    if isinstance(item, dict):
        return {key: await replace_vars(part) for key, part in item.items()}
    parts = [await replace_vars(part) for part in item]
    return type(item)(parts) if type(item) in (list, tuple, set, frozenset) else tuple(parts)
