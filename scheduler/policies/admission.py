"""Which waiting calls may start at all, beyond the plain question whether their pages fit now."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from treadle.scheduler.call import Call, Program, Status
from treadle.scheduler.policies.books import Books
from treadle.scheduler.policies.residency import MOST_SKIPPED, Residency


class AdmissionPolicy:
    """Asked for each waiting call, in order.

    `skips_blocked` says whether those behind a call that cannot start may pass it. `valid_until` is when the answers
    may change although nothing happens.
    """

    skips_blocked = False
    valid_until = math.inf

    def refresh(self, now: float) -> None:
        """Something has happened since the last time, or `valid_until` has come."""

    def candidates(self, waiting: Sequence[Call]) -> list[Call]:
        """The waiting calls to try, in order. The rest is not even looked at."""
        return list(waiting)

    def objection(self, call: Call) -> str | None:
        """Why a call may not start now."""
        return None


class Greedy(AdmissionPolicy):
    """Whatever fits starts, in order; what does not fit blocks those behind it (vLLM's rule)."""


class PauseResume(AdmissionPolicy):
    """ThunderAgent's (arXiv 2602.13692): whole programs are paused when the pool would thrash, and resumed later.

    Every `PERIOD_S` the tokens of the programs are added up, those that reason in full, those that act weighted by
    2^-t after t seconds. Above the capacity acting programs are paused, the smallest first, then reasoning ones at
    their next call; below it paused ones are resumed, those in the middle first, then new ones, the smallest first. A
    program that was paused for `FORCE_S` is resumed in any case.
    """

    skips_blocked = True
    PERIOD_S = 5.0
    FORCE_S = 1800.0

    def __init__(self, books: Books) -> None:
        self._books = books
        self._active: set[str] = set()
        self._paused_since: dict[str, float] = {}
        self._checked = -math.inf

    def refresh(self, now: float) -> None:
        if now < self._checked + self.PERIOD_S:
            return
        self._checked, self.valid_until = now, now + self.PERIOD_S
        programs = self._books.programs
        self._active &= programs.keys()
        for gone in self._paused_since.keys() - programs.keys():
            del self._paused_since[gone]
        capacity = self._books.config.num_pages * self._books.config.page_size
        tokens = {program_id: context_tokens(program) for program_id, program in programs.items()}
        load = {program_id: tokens[program_id] * self._weight(programs[program_id], now) for program_id in self._active}
        total = sum(load.values())
        for program_id in sorted(load, key=lambda p: (bool(programs[p].calls), tokens[p])):
            if total <= capacity:
                break
            total -= load[program_id]
            self._active.discard(program_id)
            self._paused_since[program_id] = now
        waiting = [program_id for program_id in programs if program_id not in self._active]
        for program_id in sorted(waiting, key=lambda p: (not programs[p].calls, programs[p].num_calls < 2, tokens[p])):
            since = self._paused_since.setdefault(program_id, now)
            if total + tokens[program_id] <= capacity or now - since > self.FORCE_S:
                total += tokens[program_id]
                self._active.add(program_id)
                del self._paused_since[program_id]

    def objection(self, call: Call) -> str | None:
        return None if call.program.id in self._active else "its program is paused"

    @staticmethod
    def _weight(program: Program, now: float) -> float:
        if program.calls or not program.leases:
            return 1.0
        idle_s = now - max(lease.since for lease in program.leases.values())
        return math.pow(2.0, -min(60.0, idle_s))


class Aimd(AdmissionPolicy):
    """Concur's (arXiv 2601.22705): a window of programs that grows by two and is halved, as TCP's.

    While less than a fifth of the pool is in use the window grows; when more than half is in use and less than a fifth
    of the prompts was found in the cache it is halved; else it stays. The oldest programs are in it.
    """

    skips_blocked = True
    PERIOD_S = 5.0

    def __init__(self, books: Books, window: int = 8) -> None:
        self._books = books
        self._window = window
        self._admitted: set[str] = set()
        self._checked = -math.inf

    def refresh(self, now: float) -> None:
        books = self._books
        if now >= self._checked + self.PERIOD_S:
            self._checked, self.valid_until = now, now + self.PERIOD_S
            used = 1 - books.memory.num_available / books.config.num_pages
            known, wanted = (sum(column) for column in zip(*books.hits, strict=True)) if books.hits else (1, 1)
            if used < 0.2:
                self._window += 2
            elif used > 0.5 and known < 0.2 * wanted:
                self._window = max(1, self._window // 2)
        oldest = sorted(books.programs.values(), key=lambda program: program.arrival)
        self._admitted = {program.id for program in oldest[: self._window]}

    def objection(self, call: Call) -> str | None:
        return None if call.program.id in self._admitted else "its program is not in the window"


class WorkingSets(AdmissionPolicy):
    """Treadle's: a call starts if its program's working set fits beside those that are to be kept."""

    skips_blocked = True

    def __init__(self, residency: Residency) -> None:
        self._residency = residency

    @property
    def valid_until(self) -> float:  # type: ignore[override]
        return self._residency.valid_until

    def refresh(self, now: float) -> None:
        self._residency.refresh(now)

    def candidates(self, waiting: Sequence[Call]) -> list[Call]:
        admitted = self._residency.admitted
        chosen = [call for call in waiting if call.id in admitted]
        return chosen + [call for call in waiting[:MOST_SKIPPED] if call.id not in admitted]

    def objection(self, call: Call) -> str | None:
        return None if call.id in self._residency.admitted else "its working set does not fit beside those kept"


def context_tokens(program: Program) -> int:
    """Tokens of a program's conversations: of its live calls, or of those that it will continue."""
    live = sum(call.num_tokens for call in program.calls.values() if call.status is not Status.PARKED)
    return live or sum(lease.num_tokens for lease in program.leases.values())


ADMISSIONS: Mapping[str, Callable[..., AdmissionPolicy]] = {
    "greedy": lambda books, residency: Greedy(),
    "pause-resume": lambda books, residency: PauseResume(books),
    "aimd": lambda books, residency: Aimd(books),
    "treadle": lambda books, residency: WorkingSets(residency),
}
"""Each makes its policy from the books and Treadle's weighing."""
