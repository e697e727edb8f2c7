"""Step costs from a measured run of a server: replay its schedule, solve for what a step and a token cost.

The measured runs are those of casys-kaist/LLMServingSim (`bench/examples/*/vllm/requests.jsonl`): for each request its
lengths and the times at which vLLM queued it, scheduled it, and produced its first and its last token. Such a run says
little of attention, which is a few per cent of it. So the attention terms are taken as known, from layer latencies,
and two terms are solved for: seconds of a step, and seconds of a token.
"""

from __future__ import annotations

import gzip
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from treadle.scheduler.simulator.hardware import StepCost, pairs

ROUNDS = 4


@dataclass(frozen=True, slots=True)
class MeasuredCall:
    """A request of a measured run: its lengths in tokens, and seconds on the server's clock."""

    prompt_tokens: int
    output_tokens: int
    queued_s: float
    first_token_s: float
    last_token_s: float

    @property
    def decode_s(self) -> float:
        """Seconds from the first token to the last one."""
        return self.last_token_s - self.first_token_s


@dataclass(frozen=True, slots=True)
class Server:
    """What decides vLLM's schedule: KV blocks, tokens of a block, most tokens and most rows of a step."""

    num_blocks: int
    block_tokens: int = 16
    step_tokens: int = 2048
    rows: int = 256


@dataclass(slots=True, eq=False)
class Replayed:
    """A request while it is replayed. `since_first` counts steps, tokens, pairs and context up to its first token."""

    call: MeasuredCall
    computed: int = 0
    generated: int = 0
    blocks: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    since_first: tuple[int, ...] = (0, 0, 0, 0)
    decode_work: tuple[int, ...] = (0, 0, 0, 0)

    @property
    def known(self) -> int:
        return self.call.prompt_tokens + self.generated


@dataclass(slots=True, eq=False)
class Replay:
    """vLLM's schedule of a run: first come, first served; chunked prefill; a full pool preempts the youngest."""

    server: Server
    step: StepCost
    now: float = 0.0
    num_preemptions: int = 0
    free: int = 0
    work: tuple[int, ...] = (0, 0, 0, 0)
    waiting: deque[Replayed] = field(default_factory=deque)
    running: list[Replayed] = field(default_factory=list)

    def run(self, calls: Sequence[MeasuredCall]) -> list[Replayed]:
        """Replays calls in the order in which they were queued, from that time on."""
        replayed = [Replayed(call) for call in sorted(calls, key=lambda call: call.queued_s)]
        coming = deque(replayed)
        self.free = self.server.num_blocks
        while coming or self.waiting or self.running:
            if not self.waiting and not self.running:
                self.now = max(self.now, coming[0].call.queued_s)
            while coming and coming[0].call.queued_s <= self.now:
                self.waiting.append(coming.popleft())
            plan = self._plan()
            if not plan:
                raise ValueError(f"{self.server.num_blocks} blocks do not hold the largest call of the run")
            self._carry_out(plan)
        return replayed

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.server.block_tokens)

    def _plan(self) -> list[tuple[Replayed, int]]:
        plan: list[tuple[Replayed, int]] = []
        budget, preemptions = self.server.step_tokens, self.num_preemptions
        while len(plan) < len(self.running) and budget > 0:
            call = self.running[len(plan)]
            count = min(call.known - call.computed, budget)
            missing = self._blocks(call.computed + count) - call.blocks
            while missing > self.free and self._preempt() is not call:
                pass
            if call.blocks == 0:
                break
            self._take(call, missing)
            plan.append((call, count))
            budget -= count
        # A step that preempted admits nobody, and a call is admitted only when its whole prompt fits.
        while preemptions == self.num_preemptions and self.waiting and budget > 0 and len(plan) < self.server.rows:
            call = self.waiting[0]
            if self._blocks(call.known) > self.free:
                break
            self.running.append(self.waiting.popleft())
            count = min(call.known, budget)
            self._take(call, self._blocks(count))
            plan.append((call, count))
            budget -= count
        return plan

    def _take(self, call: Replayed, num_blocks: int) -> None:
        self.free -= num_blocks
        call.blocks += num_blocks

    def _preempt(self) -> Replayed:
        victim = self.running.pop()
        self.num_preemptions += 1
        self._take(victim, -victim.blocks)
        victim.computed = 0
        self.waiting.appendleft(victim)
        return victim

    def _carry_out(self, plan: list[tuple[Replayed, int]]) -> None:
        prompts = [(call, count) for call, count in plan if call.computed < call.call.prompt_tokens or count > 1]
        context = sum(call.computed for call, _ in plan) - sum(call.computed for call, _ in prompts)
        step = (
            1,
            sum(count for _, count in plan),
            sum(pairs(call.computed, count) for call, count in prompts),
            context,
        )
        self.work = tuple(total + part for total, part in zip(self.work, step, strict=True))
        self.now += self.step.seconds(*step[1:])
        for call, count in plan:
            call.computed += count
            if call.computed < call.known:
                continue
            call.generated += 1
            if call.generated == 1:
                call.first_token_s, call.since_first = self.now, self.work
            if call.generated == call.call.output_tokens:
                call.last_token_s = self.now
                call.decode_work = tuple(end - begin for end, begin in zip(self.work, call.since_first, strict=True))
                self.running.remove(call)
                self._take(call, -call.blocks)


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted step cost and its errors against the run, as fractions.

    The decode errors are of the seconds from first to last token, over the calls that were held out of the fit.
    """

    step: StepCost
    num_preemptions: int
    makespan_error: float
    mean_decode_error: float
    mean_absolute_decode_error: float
    p90_absolute_decode_error: float


def fit(calls: Sequence[MeasuredCall], server: Server, guess: StepCost) -> Fit:
    """Solves for `fixed_s` and `per_token_s` on every other call; `guess` gives the attention terms and the start.

    The schedule depends on the costs and the costs on the schedule, so replaying and solving alternate. Each round is
    a least squares on relative errors of decode seconds.

    Raises:
        ValueError: the pool does not hold a call, or no two calls differ enough to tell steps from tokens.
    """
    step = guess
    for _ in range(ROUNDS):
        replayed = Replay(server, step).run(calls)
        solved = _solve([call for call in replayed[::2] if call.call.output_tokens > 1], step)
        step = replace(
            step,
            fixed_s=(step.fixed_s + solved[0]) / 2,
            per_token_s=(step.per_token_s + solved[1]) / 2,
        )
    replay = Replay(server, step)
    replayed = replay.run(calls)
    begin = min(call.queued_s for call in calls)
    measured_end = max(call.last_token_s for call in calls)
    errors = [
        (call.last_token_s - call.first_token_s) / call.call.decode_s - 1
        for call in replayed[1::2]
        if call.call.output_tokens > 1
    ]
    absolute = sorted(map(abs, errors))
    return Fit(
        step,
        replay.num_preemptions,
        (replay.now - begin) / (measured_end - begin) - 1,
        sum(errors) / len(errors),
        sum(absolute) / len(absolute),
        absolute[int(0.9 * len(absolute))],
    )


def _solve(replayed: Sequence[Replayed], step: StepCost) -> tuple[float, float]:
    """Seconds of a step and of a token: two normal equations."""
    ss = st = tt = sy = ty = 0.0
    for call in replayed:
        steps, tokens, num_pairs, context = call.decode_work
        known = num_pairs * step.per_pair_s + context * step.per_context_token_s
        s, t, y = (value / call.call.decode_s for value in (steps, tokens, call.call.decode_s - known))
        ss, st, tt, sy, ty = ss + s * s, st + s * t, tt + t * t, sy + s * y, ty + t * y
    determinant = ss * tt - st * st
    if determinant <= 1e-9 * ss * tt:
        raise ValueError("the calls of this run are too alike to tell the cost of a step from the cost of a token")
    return (sy * tt - ty * st) / determinant, (ty * ss - sy * st) / determinant


def read_run(path: Path) -> list[MeasuredCall]:
    """The requests of a measured run, JSON lines, gzip or not."""
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    rows = [json.loads(line) for line in text.splitlines()]
    return [
        MeasuredCall(
            row["input_toks"], row["output_toks"], row["queued_ts"], row["first_token_ts"], row["last_token_ts"]
        )
        for row in rows
    ]
