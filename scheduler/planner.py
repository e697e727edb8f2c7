"""Builds the plan of a step: which calls compute how many tokens, who gets a slot, and who must give one up."""

from __future__ import annotations

from collections.abc import Callable

from treadle.scheduler.call import Call, Status
from treadle.scheduler.memory import CallMemory
from treadle.scheduler.plan import PageWrite, Row, StepPlan, TokenWrite
from treadle.scheduler.roster import Roster

Log = Callable[[float, str, str, str], None]


class Planner:
    """Fills a step. There are no phases: each call has tokens that are not computed yet, and gets some of them done.

    Running calls go first, those with one token to compute (they decode) before those with many; then calls are
    admitted while slots, step tokens and pages last. A running call that cannot grow takes the place of the last one
    in rank; losing a place is losing pages, no more.
    """

    def __init__(self, memory: CallMemory, roster: Roster, max_step_tokens: int, log: Log) -> None:
        self._memory = memory
        self._roster = roster
        self._max_step_tokens = max_step_tokens
        self._log = log

    def plan(self, step_id: int, now: float) -> tuple[StepPlan, list[Call]] | None:
        """The next step, and the call of each of its rows; None if there is nothing that could be computed now."""
        draft = _Draft(step_id, self._max_step_tokens)
        preempted = self._continue_running(draft, now)
        if not preempted:
            self._admit_waiting(draft, now)
        return draft.finish()

    def _continue_running(self, draft: _Draft, now: float) -> bool:
        """Adds rows for running calls. Returns whether one had to be preempted."""
        ranked = sorted(self._roster.running, key=self._roster.rank)
        preempted = False
        for call in sorted(ranked, key=lambda call: call.num_uncomputed > 1):
            count = min(call.num_uncomputed, draft.budget)
            if count <= 0 or call.status is not Status.RUNNING:
                continue
            while not self._memory.grow(call, call.num_planned_tokens + count, evict=not call.open):
                if self._memory.num_deferred:
                    break  # pages of an ended call come back with the step in flight: nobody need suffer for it
                victim = next(c for c in reversed(ranked) if c.status is Status.RUNNING and not draft.has(c))
                self._preempt(victim, f"its pages go to {call.id}" if victim is not call else "no pages are left", now)
                preempted = True
                if victim is call:
                    break
            else:
                draft.add(call, count)
        return preempted

    def _preempt(self, call: Call, reason: str, now: float) -> None:
        self._log(now, "preempt", call.id, f"{reason}; {call.num_computed_tokens} computed tokens become evictable")
        self._memory.detach(call, now)
        self._roster.leave(call, Status.PARKED, now)
        self._roster.enqueue(call, now)

    def _admit_waiting(self, draft: _Draft, now: float) -> None:
        if not self._roster.num_free_slots or not draft.budget:
            return
        promised = sum(self._memory.num_missing_pages(call) for call in self._roster.running)
        for call in self._roster.waiting():
            if not self._roster.num_free_slots or not draft.budget:
                break
            if call.num_pending:
                continue
            self._memory.attach(call, now)
            missing = self._memory.num_missing_pages(call)
            room = self._memory.pool.num_free if call.open else self._memory.num_available
            if missing + promised > room:
                self._memory.detach(call, now, keep_tail=True)
                reason = f"needs {missing} pages"
                if reason != call.wait_reason:
                    call.wait_reason = reason
                    self._log(now, "wait", call.id, f"{reason}; {room} can be had, {promised} of them are promised")
                break
            self._start(call, draft, now)
            promised += self._memory.num_missing_pages(call)

    def _start(self, call: Call, draft: _Draft, now: float) -> None:
        """Gives a call with attached pages a slot and its first row."""
        copy = self._share_unfinished_page(call)
        call.account_cached()
        self._roster.admit(call, now)
        self._log(now, "admit", call.id, f"slot {call.slot}, {call.num_computed_tokens}/{call.num_tokens} tokens known")
        count = min(call.num_uncomputed, draft.budget)
        if count == 0:
            self._memory.detach(call, now, keep_tail=True)
            self._roster.leave(call, Status.PARKED, now)
            return
        grown = self._memory.grow(call, call.num_planned_tokens + count)
        assert grown
        if copy is not None:
            draft.copies.append(copy)
        draft.add(call, count)

    def _share_unfinished_page(self, call: Call) -> tuple[int, int] | None:
        """Copy-on-write: a fork begins with a copy of its parent's last prompt page. Returns what to copy."""
        parent, known = call.fork_of, call.num_computed_tokens
        if parent is None or parent.status is not Status.RUNNING or known % self._memory.page_size:
            return None
        shared = min(parent.num_computed_tokens, len(call.tokens) - 1) - known
        if not 0 < shared < self._memory.page_size:
            return None
        source = parent.pages[known // self._memory.page_size]
        if not self._memory.grow(call, known + shared):
            return None
        call.num_computed_tokens = call.num_planned_tokens = known + shared
        return source, call.pages[-1]


class _Draft:
    """A plan that grows."""

    def __init__(self, step_id: int, budget: int) -> None:
        self.budget = budget
        self.copies: list[tuple[int, int]] = []
        self._step_id = step_id
        self._rows: dict[str, tuple[Row, Call]] = {}
        self._token_writes: list[TokenWrite] = []
        self._page_writes: list[PageWrite] = []

    def has(self, call: Call) -> bool:
        return call.id in self._rows

    def add(self, call: Call, count: int) -> None:
        """Gives a call a row, with what the engine does not know of its slot."""
        if len(call.tokens) > call.num_sent_tokens:
            new_tokens = tuple(call.tokens[call.num_sent_tokens :])
            self._token_writes.append(TokenWrite(call.slot, call.num_sent_tokens, new_tokens))
            call.num_sent_tokens = len(call.tokens)
        if len(call.pages) > call.num_sent_pages:
            new_pages = tuple(call.pages[call.num_sent_pages :])
            self._page_writes.append(PageWrite(call.slot, call.num_sent_pages, new_pages))
            call.num_sent_pages = len(call.pages)
        start = call.num_planned_tokens
        sample = start + count == call.num_tokens and not call.open
        self._rows[call.id] = (Row(call.id, call.slot, start, count, sample), call)
        call.num_planned_tokens += count
        call.num_pending += sample
        self.budget -= count

    def finish(self) -> tuple[StepPlan, list[Call]] | None:
        if not self._rows:
            return None
        ordered = sorted(self._rows.values(), key=lambda pair: pair[0].count > 1)
        plan = StepPlan(
            self._step_id,
            tuple(row for row, _ in ordered),
            tuple(self.copies),
            tuple(self._token_writes),
            tuple(self._page_writes),
        )
        return plan, [call for _, call in ordered]
