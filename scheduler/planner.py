"""Builds the plan of a step: which calls compute how many tokens, who gets a slot, and who must give one up."""

from __future__ import annotations

from collections.abc import Callable

from treadle.scheduler.call import Call, Status
from treadle.scheduler.kv import Node
from treadle.scheduler.leases import Leases
from treadle.scheduler.memory import CallMemory
from treadle.scheduler.plan import PageWrite, Row, StepPlan, TokenWrite
from treadle.scheduler.policies import MOST_SKIPPED, AdmissionPolicy, Books, RetentionPolicy
from treadle.scheduler.roster import Roster

Log = Callable[[float, str, Call, str], None]


class Planner:
    """Fills a step. There are no phases: each call has tokens that are not computed yet, and gets some of them done.

    Running calls go first, those with one token to compute (they decode) before those with many; then calls are
    admitted while slots, step tokens and pages last. A running call that cannot grow takes the place of the last one
    in rank; losing a place is losing pages, no more.

    Admission is looked at again only when something has happened since it last had nothing to do (`stale`).
    """

    def __init__(
        self,
        memory: CallMemory,
        roster: Roster,
        leases: Leases,
        retention: RetentionPolicy,
        admission: AdmissionPolicy,
        books: Books,
        max_step_tokens: int,
        log: Log,
    ) -> None:
        self.stale = True
        self._memory = memory
        self._roster = roster
        self._leases = leases
        self._retention = retention
        self._admission = admission
        self._books = books
        self._max_step_tokens = max_step_tokens
        self._log = log

    def plan(self, step_id: int, now: float, max_repeat: int) -> tuple[StepPlan, list[Call]] | None:
        """The next step, and the call of each of its rows; None if there is nothing that could be computed now."""
        draft = _Draft(step_id, self._max_step_tokens)
        if now >= min(self._admission.valid_until, self._retention.next_deadline):
            self.stale = True
        if self.stale:
            self._retention.expire(now)
            self._roster.refresh_ranks()
            self._look_again(now)
            self._admission.refresh(now)
        preempted = self._continue_running(draft, now)
        if self.stale and (not preempted or draft.is_empty):
            self.stale = False
            self._admit_waiting(draft, now)
            while draft.is_empty and not self._memory.is_loading and self._roster.num_waiting:
                if not self._retention.relent(now):
                    break
                self._admit_waiting(draft, now)
        repeat = 1
        if max_repeat > 1 and not self.stale and draft.only_decodes:
            repeat = self._look_ahead(draft, max_repeat, now)
        saves, loads = self._memory.take_moves()
        if loads:
            self.stale, repeat = True, 1
        return draft.finish(saves, loads, repeat, min(self._admission.valid_until, self._retention.next_deadline))

    def _continue_running(self, draft: _Draft, now: float) -> bool:
        """Adds rows for running calls. Returns whether one had to be preempted."""
        ranked = self._roster.ranked_running(now)
        page_size = self._memory.page_size
        preempted = False
        long_rows: list[Call] = []
        for call in ranked:
            uncomputed = call.num_uncomputed
            if uncomputed > 1 or call.open:
                long_rows.append(call)
            elif uncomputed == 1 and draft.budget and call.num_planned_tokens < len(call.pages) * page_size:
                draft.add(call, 1)
            elif call.status is Status.RUNNING:
                preempted |= self._continue(call, ranked, draft, now)
        for call in long_rows:
            if call.status is Status.RUNNING and not (call.open and draft.prefills):
                preempted |= self._continue(call, ranked, draft, now)
        return preempted

    def _continue(self, call: Call, ranked: list[Call], draft: _Draft, now: float) -> bool:
        """Adds a row for a running call. Returns whether one had to be preempted for it."""
        count = min(call.num_uncomputed, draft.budget)
        if count <= 0:
            return False
        preempted = False
        while not self._memory.grow(call, call.num_planned_tokens + count, now, evict=not call.open):
            if self._memory.num_deferred:
                return preempted  # pages of an ended call come back with the step in flight: nobody need suffer for it
            victim = next(c for c in reversed(ranked) if c.status is Status.RUNNING and not draft.has(c))
            self._preempt(victim, f"its pages go to {call.id}" if victim is not call else "no pages are left", now)
            preempted = True
            if victim is call:
                return preempted
        draft.add(call, count)
        return preempted

    def _look_again(self, now: float) -> None:
        """Others may have computed what the next waiting calls begin with, since those came."""
        for call in self._roster.waiting(now)[:MOST_SKIPPED]:
            lease = call.program.leases[call.id]
            if self._memory.tree.page_key(call.tokens, lease.num_known_tokens) in lease.node.children:
                self._leases.move(call, self._memory.find(call, now).deepest)

    def _look_ahead(self, draft: _Draft, repeat: int, now: float) -> int:
        """Gives decoding calls the pages of their next tokens too, for as many repetitions as all of them can have."""
        for call in draft.calls():
            assert call.max_tokens is not None
            repeat = min(repeat, call.max_tokens - (call.num_tokens - call.num_prompt_tokens) + 1)
        if repeat > 1:
            grown = all(self._memory.grow(call, call.num_planned_tokens + repeat - 1, now) for call in draft.calls())
            for call in draft.calls():
                draft.send_pages(call)
            return repeat if grown else 1
        return 1

    def _preempt(self, call: Call, reason: str, now: float) -> None:
        self._log(now, "preempt", call, f"{reason}; {call.num_computed_tokens} computed tokens become evictable")
        node = self._memory.detach(call, now)
        self._roster.leave(call, Status.PARKED, now)
        if self._memory.has_work(call):
            self._leases.wait(call, node, now)
            self._roster.enqueue(call, now)
        else:
            self._leases.park(call, node, now)
        self.stale = True

    def _admit_waiting(self, draft: _Draft, now: float) -> None:
        if not self._roster.num_waiting:
            return
        promised = sum(self._memory.num_missing_pages(call) for call in self._roster.running)
        pending = self._pending_pages()
        blocked = False
        for call in self._admission.candidates(self._roster.waiting(now)):
            if not self._roster.num_free_slots:
                break
            if not draft.budget:
                self.stale = True
                break
            if call.num_pending:
                self.stale = True
                continue
            idle = draft.is_empty and not self._memory.is_loading
            reason = None if idle else self._admission.objection(call)
            if reason is None:
                reason = self._try(call, promised, pending, draft, now)
            if reason is None:
                promised += self._memory.num_missing_pages(call)
                continue
            blocked = blocked or not self._admission.skips_blocked
            if reason != call.wait_reason:
                call.wait_reason = reason
                self._log(now, "wait", call, reason)
            if blocked:
                break

    def _pending_pages(self) -> dict[tuple[Node, bytes], Call]:
        """The page that each running call fills next, if all its tokens are known: who wants the same waits for it."""
        return {
            (call.node, self._memory.next_page_key(call)): call
            for call in self._roster.running
            if call.node is not None and self._memory.has_next_page(call)
        }

    def _try(
        self, call: Call, promised: int, pending: dict[tuple[Node, bytes], Call], draft: _Draft, now: float
    ) -> str | None:
        """Starts a call, or begins to load its pages, or says why neither can be done."""
        memory = self._memory
        match = memory.find(call, now)
        memory.attach(call, match)
        missing = memory.num_missing_pages(call)
        room = memory.pool.num_free if call.open else memory.num_available
        if missing + promised > room:
            self._back_to_waiting(call, now)
            return f"needs {missing} pages"
        if match.hosted:
            loaded = memory.load(match.hosted, draft.step_id, now)
            if loaded:
                self._log(now, "load", call, f"{loaded} pages come from host memory")
            self.stale = True
            self._back_to_waiting(call, now)
            return None
        if match.usable_from > draft.step_id:
            self.stale = True
            self._back_to_waiting(call, now)
            return None
        if call.open and draft.prefills:
            self.stale = True
            self._back_to_waiting(call, now)
            return "its prompt still grows, and others have work"
        if memory.has_next_page(call):
            other = pending.get((match.node, memory.next_page_key(call)))
            if other is not None:
                self.stale = True
                self._back_to_waiting(call, now)
                return f"{other.id} computes the same prefix"
        self._start(call, draft, now)
        if call.node is not None and memory.has_next_page(call):
            pending[call.node, memory.next_page_key(call)] = call
        return None

    def _back_to_waiting(self, call: Call, now: float) -> None:
        self._memory.detach(call, now, keep_tail=True)

    def _start(self, call: Call, draft: _Draft, now: float) -> None:
        """Gives a call with attached pages a slot and its first row."""
        copy = self._share_unfinished_page(call, now)
        call.account_cached()
        self._books.hits.append((call.num_computed_tokens, call.num_prompt_tokens))
        if call.num_computed_tokens * 2 < call.num_prompt_tokens:
            self._books.queued.append(now - call.waiting_since)
        self._leases.end(call)
        self._retention.resumed(call.program, now)
        self._roster.admit(call, now)
        self._log(now, "admit", call, f"slot {call.slot}, {call.num_computed_tokens}/{call.num_tokens} tokens known")
        if not self._memory.has_work(call):
            self._leases.park(call, self._memory.detach(call, now, keep_tail=True), now)
            self._roster.leave(call, Status.PARKED, now)
            return
        count = min(call.num_uncomputed, draft.budget)
        grown = self._memory.grow(call, call.num_planned_tokens + count, now)
        assert grown
        if copy is not None:
            draft.copy(*copy)
        draft.add(call, count)

    def _share_unfinished_page(self, call: Call, now: float) -> tuple[int, int] | None:
        """Copy-on-write: a fork begins with a copy of its parent's last prompt page. Returns what to copy."""
        parent, known = call.fork_of, call.num_computed_tokens
        if parent is None or parent.status is not Status.RUNNING or known % self._memory.page_size:
            return None
        shared = min(parent.num_computed_tokens, len(call.tokens) - 1) - known
        if not 0 < shared < self._memory.page_size:
            return None
        source = parent.pages[known // self._memory.page_size]
        if not self._memory.grow(call, known + shared, now):
            return None
        call.num_computed_tokens = call.num_planned_tokens = known + shared
        return source, call.pages[-1]


class _Draft:
    """A plan that grows."""

    def __init__(self, step_id: int, budget: int) -> None:
        self.step_id = step_id
        self.budget = budget
        self.copies: list[tuple[int, int]] = []
        self._ids: set[str] = set()
        self._decoding: list[tuple[Row, Call]] = []
        self._prefilling: list[tuple[Row, Call]] = []
        self._token_writes: list[TokenWrite] = []
        self._page_writes: list[PageWrite] = []

    @property
    def is_empty(self) -> bool:
        return not self._ids

    @property
    def prefills(self) -> bool:
        """Whether a row computes more than one token."""
        return bool(self._prefilling)

    @property
    def only_decodes(self) -> bool:
        """Whether every row computes one token and samples the next."""
        return bool(self._decoding) and not self._prefilling and all(row.sample for row, _ in self._decoding)

    def calls(self) -> list[Call]:
        return [call for _, call in self._decoding + self._prefilling]

    def has(self, call: Call) -> bool:
        return call.id in self._ids

    def add(self, call: Call, count: int) -> None:
        """Gives a call a row, with what the engine does not know of its slot."""
        tokens = call.tokens
        if len(tokens) > call.num_sent_tokens:
            self._token_writes.append(TokenWrite(call.slot, call.num_sent_tokens, tokens[call.num_sent_tokens :]))
            call.num_sent_tokens = len(tokens)
        if len(call.pages) > call.num_sent_pages:
            self.send_pages(call)
        start = call.num_planned_tokens
        sample = start + count == call.num_tokens and not call.open
        row = Row(call.id, call.slot, start, count, sample)
        self._ids.add(call.id)
        (self._decoding if count == 1 else self._prefilling).append((row, call))
        call.num_planned_tokens += count
        call.num_pending += sample
        self.budget -= count

    def send_pages(self, call: Call) -> None:
        """Tells the engine of pages that it does not know of."""
        if len(call.pages) > call.num_sent_pages:
            new_pages = tuple(call.pages[call.num_sent_pages :])
            self._page_writes.append(PageWrite(call.slot, call.num_sent_pages, new_pages))
            call.num_sent_pages = len(call.pages)

    def copy(self, source: int, target: int) -> None:
        """Copies a page. Of a page that is itself a copy of this step the original is taken: no order among copies."""
        original = next((page for page, copy in self.copies if copy == source), source)
        self.copies.append((original, target))

    def finish(
        self, saves: tuple[tuple[int, int], ...], loads: tuple[tuple[int, int], ...], repeat: int, valid_until: float
    ) -> tuple[StepPlan, list[Call]] | None:
        if self.is_empty and not saves and not loads:
            return None
        plan = StepPlan(
            self.step_id,
            tuple(row for row, _ in self._decoding + self._prefilling),
            tuple(self.copies),
            tuple(self._token_writes),
            tuple(self._page_writes),
            saves,
            loads,
            repeat,
            valid_until,
        )
        return plan, self.calls()
