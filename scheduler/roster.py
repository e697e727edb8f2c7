"""Who runs and who waits: the queue, the slots, and the moves between them."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

from treadle.scheduler.call import Call, Status
from treadle.scheduler.policies import OrderPolicy


class Roster:
    """The live calls by status, in the order of a policy. Open calls come after all complete ones."""

    def __init__(self, num_slots: int, order: OrderPolicy) -> None:
        self.running: list[Call] = []
        self._waiting: list[Call] = []
        self._is_sorted = True
        self._ranked: list[Call] | None = None
        self._order = order
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))

    def rank(self, call: Call, now: float) -> tuple[float, ...]:
        """The lowest is served first and preempted last."""
        return (call.open, *self._order.rank(call, now))

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def ranked_running(self, now: float) -> list[Call]:
        """The running calls, the first in rank first. The list may be kept: it does not change later."""
        if self._ranked is None:
            self._ranked = sorted(self.running, key=lambda call: self.rank(call, now))
        return self._ranked

    def waiting(self, now: float) -> list[Call]:
        """The waiting calls, the next one first. Whoever changes the roster while going through it copies it first."""
        if not self._is_sorted:
            self._waiting.sort(key=lambda call: self.rank(call, now))
            self._is_sorted = True
        return self._waiting

    def enqueue(self, call: Call, now: float) -> None:
        """The call has work to do and no slot."""
        assert call.slot < 0
        call.status = Status.WAITING
        call.waiting_since = now
        if self._order.is_static and self._is_sorted:
            insort(self._waiting, call, key=lambda other: self.rank(other, now))
        else:
            self._waiting.append(call)
            self._is_sorted = False

    def reorder(self) -> None:
        """The rank of a call has changed."""
        self._is_sorted = False
        self._ranked = None

    def refresh_ranks(self) -> None:
        """Ranks may have changed, if the policy is one of those whose ranks do."""
        if not self._order.is_static:
            self.reorder()

    def admit(self, call: Call, now: float) -> None:
        """Gives a waiting call a slot."""
        self._waiting.remove(call)
        call.tally.queued_s += now - call.waiting_since
        call.status = Status.RUNNING
        call.slot = self._free_slots.pop()
        call.num_sent_tokens = call.num_sent_pages = 0
        call.wait_reason = ""
        self.running.append(call)
        self._ranked = None

    def leave(self, call: Call, status: Status, now: float) -> None:
        """Takes a call out of the queue or its slot; it is parked or finished from now on."""
        if call.status is Status.WAITING:
            self._waiting.remove(call)
            call.tally.queued_s += now - call.waiting_since
        elif call.status is Status.RUNNING:
            self.running.remove(call)
            self._ranked = None
            self._free_slots.append(call.slot)
            call.slot = -1
            call.epoch += 1
        call.status = status

    def check_integrity(self, live: Iterable[Call]) -> None:
        """Asserts that each live call is where its status says, and each slot with one call or free."""
        by_status: dict[Status, set[Call]] = {status: set() for status in Status}
        for call in live:
            by_status[call.status].add(call)
        assert set(self.running) == by_status[Status.RUNNING] and len(self.running) == len(by_status[Status.RUNNING])
        assert set(self._waiting) == by_status[Status.WAITING] and len(self._waiting) == len(by_status[Status.WAITING])
        assert not by_status[Status.FINISHED]
        slots = self._free_slots + [call.slot for call in self.running]
        assert sorted(slots) == list(range(self._num_slots))
        assert all(call.slot < 0 for call in by_status[Status.PARKED] | by_status[Status.WAITING])
