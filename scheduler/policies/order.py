"""Who goes first: a rank for each call; the lowest is served first and preempted last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from treadle.scheduler.call import Call


class OrderPolicy(Protocol):
    """Ranks calls. Ranks are compared, and a call's rank does not change while it waits."""

    def rank(self, call: Call) -> tuple[int, ...]: ...


class Fcfs:
    """Calls in the order in which they came, as request-level servers do."""

    def rank(self, call: Call) -> tuple[int, ...]:
        return (call.arrival,)


class ProgramFcfs:
    """Calls of the oldest program first, so that programs finish one after another."""

    def rank(self, call: Call) -> tuple[int, ...]:
        return (call.program.arrival, call.arrival)


ORDERS: Mapping[str, type[OrderPolicy]] = {"fcfs": Fcfs, "program-fcfs": ProgramFcfs}
