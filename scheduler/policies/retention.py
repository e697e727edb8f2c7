"""Which computed pages are given up first when memory is short."""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator, Mapping

from treadle.scheduler.call import Program
from treadle.scheduler.kv import Lease, Node
from treadle.scheduler.policies.books import Books
from treadle.scheduler.policies.residency import Residency

Priority = tuple[float, ...]


class RetentionPolicy:
    """Orders what could be given up, leaves of the prefix tree; the lowest priority goes first, in either tier.

    A policy may also pin: lock the nodes of leases. It is told when leases begin and end, and must give way when asked.
    `heeds_hints` says whether it asks when owners of leases are expected back, which is what hints change.
    """

    heeds_hints = False
    num_pins = 0
    next_deadline = math.inf

    def priority(self, leaf: Node, now: float) -> Priority:
        raise NotImplementedError

    def rested(self, program: Program, lease: Lease, now: float) -> None:
        """A call of the program came to rest, and its pages are wanted after a pause."""

    def resumed(self, program: Program, now: float) -> None:
        """A call of the program started, or the program ended."""

    def expire(self, now: float) -> None:
        """Time has passed."""

    def relent(self, now: float) -> bool:
        """Nothing can run: gives up a pin. Returns whether there was one."""
        return False


class LeastRecentlyUsed(RetentionPolicy):
    """What was used longest ago goes first, as in vLLM's and SGLang's prefix caches."""

    def priority(self, leaf: Node, now: float) -> Priority:
        return (leaf.last_used,)


class FixedTime(RetentionPolicy):
    """A lease protects for a fixed number of seconds after a turn; otherwise least recently used."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def priority(self, leaf: Node, now: float) -> Priority:
        return (any(now - lease.since <= self._seconds for lease in leases_below(leaf)), leaf.last_used)


class Continuum(LeastRecentlyUsed):
    """Pins a program's pages for a time to live after each turn (Continuum / CacheTTL, arXiv 2511.02230).

    The paper's rule: with F the times that a tool took so far, hold for the tau that maximises
    P(X <= tau) (T eta + R(n)) - tau, where T is the mean time that programs wait which lost their pages, eta how much
    turns done tell of turns left, R(n) the seconds to compute n tokens again. While fewer than `ENOUGH` times are known
    for a tool those of all tools count; while fewer of those, an exponential distribution of mean 1 s.

    With `released_s` the rule of the released code: hold for that time if the tool's mean is not above it, else not.

    Pins are hard: they are given up when their time is over, when the program goes on, or one by one, the latest
    deadline first, when nothing can run.
    """

    ENOUGH = 100

    def __init__(self, books: Books, released_s: float | None = None) -> None:
        self._books = books
        self._released_s = released_s
        self._pins: dict[str, tuple[float, Node]] = {}
        self._rests: dict[str, tuple[float, str]] = {}
        self._times: dict[str, deque[float]] = {}
        self._all: deque[float] = deque(maxlen=1024)

    @property
    def num_pins(self) -> int:  # type: ignore[override]
        return len(self._pins)

    def rested(self, program: Program, lease: Lease, now: float) -> None:
        self._unpin(program, now)
        tool = lease.pause[1] if lease.pause is not None else ""
        self._rests[program.id] = (now, tool)
        seconds = self._time_to_live(tool, lease.num_tokens)
        if seconds > 0:
            self._books.memory.tree.lock(lease.node)
            self._pins[program.id] = (now + seconds, lease.node)
            program.pinned = True
            self.next_deadline = min(self.next_deadline, now + seconds)

    def resumed(self, program: Program, now: float) -> None:
        self._unpin(program, now)
        began = self._rests.pop(program.id, None)
        if began is not None and program.calls:
            since, tool = began
            times = self._times.setdefault(tool, deque(maxlen=1024)) if len(self._times) < 1024 else self._all
            times.append(now - since)
            self._all.append(now - since)

    def expire(self, now: float) -> None:
        if now < self.next_deadline:
            return
        for program_id, (deadline, _) in list(self._pins.items()):
            program = self._books.programs[program_id]
            if deadline <= now and not program.calls:
                self._unpin(program, now)
        deadlines = [deadline for deadline, _ in self._pins.values() if deadline > now]
        self.next_deadline = min(deadlines, default=math.inf)

    def relent(self, now: float) -> bool:
        if not self._pins:
            return False
        latest = max(self._pins, key=lambda program_id: self._pins[program_id][0])
        self._unpin(self._books.programs[latest], now)
        return True

    def _unpin(self, program: Program, now: float) -> None:
        pin = self._pins.pop(program.id, None)
        if pin is not None:
            self._books.memory.tree.unlock(pin[1], now)
            program.pinned = False

    def _time_to_live(self, tool: str, num_tokens: int) -> float:
        own = self._times.get(tool, ())
        if self._released_s is not None:
            known = len(own) > 0
            return self._released_s if not known or sum(own) / len(own) <= self._released_s else 0.0
        queued = self._books.queued
        waiting = sum(queued) / len(queued) if queued else 0.0
        gain = waiting * _memory_of_turns(self._books.turns) + self._books.costs.compute(0, num_tokens)
        samples = own if len(own) > self.ENOUGH else self._all
        if len(samples) <= self.ENOUGH:
            return max(0.0, math.log(gain)) if gain > 0 else 0.0
        ranked: list[float] = []
        for sample in samples:
            insort(ranked, sample)
        values = [((index + 1) / len(ranked) * gain - tau, tau) for index, tau in enumerate(ranked)]
        best, tau = max(values)
        return tau if best > 0 else 0.0


def _memory_of_turns(turns: deque[int]) -> float:
    """eta of Continuum: minus the correlation of turns done and turns left, over all turns of the ended programs."""
    pairs = [(done, total - done) for total in turns for done in range(total)]
    if len(pairs) < 2:
        return 1.0
    mean_done = sum(done for done, _ in pairs) / len(pairs)
    mean_left = sum(left for _, left in pairs) / len(pairs)
    both = sum((done - mean_done) * (left - mean_left) for done, left in pairs)
    spread = sum((done - mean_done) ** 2 for done, _ in pairs) * sum((left - mean_left) ** 2 for _, left in pairs)
    return -both / math.sqrt(spread) if spread > 0 else 1.0


class WorkingSet(RetentionPolicy):
    """Treadle's: what nobody will want goes first, then those that return late, then the youngest programs.

    The classes are those of `Residency`, which weighs the expected pause against what losing the pages would cost.
    """

    heeds_hints = True

    def __init__(self, residency: Residency) -> None:
        self._residency = residency

    def priority(self, leaf: Node, now: float) -> Priority:
        leases = leases_below(leaf) if leaf.children else leaf.leases.values()
        return max(map(self._residency.value, leases), default=(-1.0, leaf.last_used))


def leases_below(leaf: Node) -> Iterator[Lease]:
    """The leases that a leaf is needed for: its own, and those of what hangs from it in host memory."""
    below = [leaf]
    while below:
        node = below.pop()
        yield from node.leases.values()
        below += node.children.values()


RETENTIONS: Mapping[str, Callable[..., RetentionPolicy]] = {
    "lru": lambda books, residency: LeastRecentlyUsed(),
    "fixed": lambda books, residency, seconds=2.0: FixedTime(seconds),
    "continuum": lambda books, residency: Continuum(books),
    "continuum-released": lambda books, residency, seconds=2.0: Continuum(books, seconds),
    "treadle": lambda books, residency: WorkingSet(residency),
}
"""Each makes its policy from the books and Treadle's weighing; `fixed` and `continuum-released` also from seconds."""
