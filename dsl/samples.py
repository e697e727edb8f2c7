"""Several answers to one prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from treadle.dsl.errors import DSLError
from treadle.dsl.location import caller
from treadle.dsl.var import Signal, Var, text_of
from treadle.dsl.varlist import VarList

T_co = TypeVar("T_co", covariant=True)


class Samples(VarList[T_co]):
    """The variables of `fn.n(k)(...)`: k calls that share one prompt. Await it for all values, or choose:

    ::

        drafts = write.n(3)(topic)
        (quickest,) = await drafts.first()
        longest = await drafts.best(key=len)
        usual = await classify.n(5)(text).vote()

    Samples that fail are left out of a choice, unless too few remain; then the first failure is raised.
    """

    async def first(self, count: int = 1) -> list[T_co]:
        """The values of the `count` samples that finish first, in that order; the others are cancelled."""
        if not 1 <= count <= len(self):
            raise DSLError(f"{caller()}: first({count}) of {len(self)} samples")
        done = await _successes(self._vars, count)
        for var in self._vars:
            if not var.is_done:
                var.cancel()
        return [await var for var in done]

    async def best(self, key: Callable[[T_co], Any]) -> T_co:
        """The value with the largest `key`; the first of equals."""
        values = [await var for var in self._in_order(await _successes(self._vars))]
        return max(values, key=key)

    async def vote(self) -> T_co:
        """The most frequent value, as compared by how it is written; the first of equals."""
        values = [await var for var in self._in_order(await _successes(self._vars))]
        ballots = [text_of(value) for value in values]
        ((winner, _),) = Counter(ballots).most_common(1)
        return values[ballots.index(winner)]

    def _in_order(self, variables: Sequence[Var[T_co]]) -> list[Var[T_co]]:
        chosen = {id(var) for var in variables}
        return [var for var in self._vars if id(var) in chosen]


async def _successes(variables: Sequence[Var[T_co]], count: int | None = None) -> list[Var[T_co]]:
    """Those that have a value, in order of finishing: the first `count`, or all when all are done."""
    if any(var.stand_in is not None for var in variables):
        return list(variables[:count])
    succeeded: list[Var[T_co]] = []
    failed: list[Var[T_co]] = []
    changed = Signal()

    def sort(var: Var[T_co]) -> None:
        (succeeded if var.error is None else failed).append(var)
        changed.wake()

    for var in variables:
        var.on_done(sort)
    needed = count or 1
    while len(failed) <= len(variables) - needed and len(succeeded) < (count or len(variables) - len(failed)):
        await changed.wait()
    if len(succeeded) < needed:
        assert failed[0].error is not None
        raise failed[0].error
    return succeeded[:count]
