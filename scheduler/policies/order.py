"""Who goes first: a rank for each call; the lowest is served first and preempted last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from treadle.scheduler.call import Call, Program

Rank = tuple[float, ...]


class OrderPolicy(Protocol):
    """Ranks calls, and programs among each other.

    Unless a policy `is_static`, ranks are looked at again when something happens; they do not change by time alone.
    """

    @property
    def is_static(self) -> bool: ...

    def rank(self, call: Call, now: float) -> Rank: ...

    def program_rank(self, program: Program, now: float) -> Rank: ...


class Fcfs:
    """Calls in the order in which they came, as request-level servers do."""

    is_static = True

    def rank(self, call: Call, now: float) -> Rank:
        return (call.arrival,)

    def program_rank(self, program: Program, now: float) -> Rank:
        return (program.arrival,)


class ProgramFcfs:
    """Calls of the oldest program first, so that programs finish one after another."""

    is_static = True

    def rank(self, call: Call, now: float) -> Rank:
        return (call.program.arrival, call.arrival)

    def program_rank(self, program: Program, now: float) -> Rank:
        return (program.arrival,)


class ProgramOrder:
    """Treadle's: the highest priority, then the program that is due first, then the call on its longest path.

    Programs that do not say when they are due are so equally long after they came: the oldest is first. The length of
    a path is what its calls and tools are expected to take, as far as they were declared when the call was submitted.
    """

    is_static = True

    def rank(self, call: Call, now: float) -> Rank:
        program = call.program
        return (-program.priority, program.due, program.arrival, -call.remaining_s, call.arrival)

    def program_rank(self, program: Program, now: float) -> Rank:
        return (-program.priority, program.due, program.arrival)


class PinnedFirst(ProgramFcfs):
    """Continuum's: programs that have a pin before the others, then the oldest program (arXiv 2511.02230)."""

    is_static = False

    def rank(self, call: Call, now: float) -> Rank:
        return (not call.program.pinned, *super().rank(call, now))


class Plas:
    """PLAS of Autellix (arXiv 2502.13965): least attained service first, in queues whose thresholds double.

    A program is in the queue that its service has come to; in a queue the first come is served first. A program that
    has waited `patience` times as long as it was served goes to the first queue, as in the paper's starvation rule.
    """

    is_static = False

    def __init__(self, first_threshold_s: float = 2.0, num_queues: int = 7, patience: float = 8.0) -> None:
        self._thresholds = [first_threshold_s * 2**index for index in range(num_queues - 1)]
        self._patience = patience

    def rank(self, call: Call, now: float) -> Rank:
        waited = call.program.tally.queued_s + (now - call.waiting_since)
        if waited > self._patience * max(1.0, call.program.service_s):
            return (0, call.arrival)
        return (self._queue(self.service(call)), call.arrival)

    def program_rank(self, program: Program, now: float) -> Rank:
        return (self._queue(program.service_s), program.arrival)

    def service(self, call: Call) -> float:
        """The attained service that ranks a call: its program's, all calls together."""
        return call.program.service_s

    def _queue(self, service_s: float) -> int:
        return sum(service_s >= threshold for threshold in self._thresholds)


class Atlas(Plas):
    """ATLAS of Autellix: as PLAS, with the service along the longest path to the call, so that branches do not add."""

    def service(self, call: Call) -> float:
        return call.path_s + call.tally.service_s


ORDERS: Mapping[str, Callable[..., OrderPolicy]] = {
    "fcfs": Fcfs,
    "program-fcfs": ProgramFcfs,
    "continuum": PinnedFirst,
    "treadle": ProgramOrder,
    "plas": Plas,
    "atlas": Atlas,
}
"""Each makes its policy; `plas` and `atlas` also from the seconds of their first threshold."""
