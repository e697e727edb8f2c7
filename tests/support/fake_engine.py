"""An honest fake of the engine: it computes no tensors, but it has pages, and notices when they hold the wrong thing.

The "KV" of a token is a hash of the token and everything before it, so a row whose pages are not exactly the
computed prefix of its call fails at once. The sampled token is a function of that hash, as with a real model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from treadle.scheduler import (
    CallFinished,
    Event,
    RowOutput,
    Scheduler,
    SchedulerConfig,
    StepPlan,
    StepResult,
    TokensOut,
)

STEP_S = 0.01


def chain(before: int, token: int) -> int:
    return hash((before, token))


def oracle(prompt: Iterable[int], num_tokens: int, vocab_size: int, stop: frozenset[int] = frozenset()) -> list[int]:
    """The tokens that a prompt leads to, computed without any engine."""
    state = 1
    for token in prompt:
        state = chain(state, token)
    generated: list[int] = []
    while len(generated) < num_tokens and not (generated and generated[-1] in stop):
        generated.append(state % vocab_size)
        state = chain(state, generated[-1])
    return generated


class FakeEngine:
    """Runs a scheduler, zero or one step ahead."""

    def __init__(self, config: SchedulerConfig, *, ahead: bool = False) -> None:
        self.scheduler = Scheduler(config)
        self.ahead = ahead
        self.now = 0.0
        self.config = config
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, CallFinished] = {}
        self.events: list[Event] = []
        self.plans: list[StepPlan] = []
        self.fail_calls: set[str] = set()
        self._token_pool: dict[tuple[int, int], int] = {}
        self._page_table: dict[tuple[int, int], int] = {}
        self._kv: dict[tuple[int, int], int] = {}
        self._host: dict[tuple[int, int], int] = {}
        self._results: deque[StepResult] = deque()

    def send(self, *commands) -> list[Event]:
        events = [event for command in commands for event in self.scheduler.apply(command, self.now)]
        self._record(events)
        return events

    def step(self) -> bool:
        """One turn of the loop: launch a plan, complete the one before (or this one). False if there was nothing."""
        plan = self.scheduler.plan(self.now)
        if plan is not None:
            self.plans.append(plan)
            self._results.append(self._execute(plan))
        self.now += STEP_S
        busy = plan is not None or bool(self._results)
        while len(self._results) > (1 if self.ahead and plan is not None else 0):
            self._record(self.scheduler.complete(self._results.popleft(), self.now))
        return busy

    def run(self, max_steps: int = 100_000) -> None:
        for _ in range(max_steps):
            if not self.step():
                assert self.scheduler.num_running == self.scheduler.num_waiting == 0, "stuck"
                return
        raise AssertionError("does not come to rest")

    def _execute(self, plan: StepPlan) -> StepResult:
        size = self.config.page_size
        assert max(len(plan.saves), len(plan.loads)) <= self.config.max_step_moves
        for page, slot in plan.saves:
            for offset in range(size):
                self._host[slot, offset] = self._kv[page, offset]
        copied = {
            (target, offset): self._kv[source, offset]
            for source, target in plan.copies
            for offset in range(size)
            if (source, offset) in self._kv
        }
        self._kv.update(copied)
        for write in plan.token_writes:
            for i, token in enumerate(write.token_ids):
                self._token_pool[write.slot, write.position + i] = token
        for entry in plan.page_writes:
            for i, page in enumerate(entry.pages):
                self._page_table[entry.slot, entry.index + i] = page
        assert plan.num_tokens <= self.config.max_step_tokens
        assert len({row.slot for row in plan.rows}) == len({row.call_id for row in plan.rows}) == len(plan.rows)
        outputs, failed = [], []
        for row in plan.rows:
            if row.call_id in self.fail_calls:
                failed.append((row.call_id, "made to fail"))
                continue
            state = 1
            for position in range(row.end):
                state = chain(state, self._token_pool[row.slot, position])
                place = self._page_table[row.slot, position // size], position % size
                if position >= row.start:
                    self._kv[place] = state
                assert self._kv[place] == state, f"{row.call_id}: the KV at {position} is not its own"
            if row.sample:
                token = state % self.config.vocab_size
                self._token_pool[row.slot, row.end] = token
                outputs.append(RowOutput(row.call_id, (token,)))
        for slot, page in plan.loads:
            for offset in range(size):
                self._kv[page, offset] = self._host[slot, offset]
        return StepResult(plan.step_id, STEP_S, tuple(outputs), tuple(failed))

    def _record(self, events: list[Event]) -> None:
        self.events += events
        for event in events:
            if isinstance(event, TokensOut):
                assert event.call_id not in self.finished, "tokens after the end"
                self.tokens.setdefault(event.call_id, []).extend(event.token_ids)
            elif isinstance(event, CallFinished):
                assert event.call_id not in self.finished, "ended twice"
                self.finished[event.call_id] = event
