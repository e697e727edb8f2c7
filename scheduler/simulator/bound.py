"""The fluid lower bound: what no policy can beat, because the work has to be done.

An engine that loses nothing, computes nothing twice and fills every step still needs some seconds for each program. A
single server that works them off in the best order cannot be beaten in mean completion time:

- Closed loop of C programs. The programs' ends t(1) <= t(2) <= ... are also the beginnings of all but the first C. So
  the completion times add up to the last C ends, and the k-th end is not before the k smallest works are done.
- Open arrivals. Shortest remaining work first is the best order (Schrage 1968).

Nor can a program be faster than its longest chain of calls is with a server and its pauses to itself.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

from treadle.scheduler.simulator.hardware import Hardware, pairs
from treadle.scheduler.simulator.workload import Blocks, ProgramSpec, Workload


@dataclass(frozen=True, slots=True)
class _Work:
    """What calls need at least: seconds for their tokens, rows in so many steps, and the pauses before them."""

    tokens_s: float = 0.0
    steps: int = 0
    pause_s: float = 0.0

    def and_then(self, prefill_s: float, decode_s: float, steps: int, pause_s: float) -> _Work:
        """With one more call."""
        return _Work(self.tokens_s + prefill_s + decode_s, self.steps + steps, self.pause_s + pause_s)

    def alone_s(self, fixed_s: float) -> float:
        """Seconds with nothing else in the steps, which take `fixed_s` beside their tokens."""
        return self.tokens_s + fixed_s * self.steps


def fluid_mean_s(workload: Workload, hardware: Hardware, concurrency: int | None) -> float:
    """Seconds that the mean completion time of the programs cannot be below.

    `concurrency` is that of a closed loop, None with open arrivals.
    """
    fixed_s = hardware.step.fixed_s
    works = _works(workload, hardware)
    rows = hardware.rows
    if concurrency is not None:
        rows = min(rows, sum(sorted(map(_most_at_once, workload.programs))[-concurrency:]))
    shares = [work.tokens_s + fixed_s * work.steps / rows for work, _ in works]
    if concurrency is not None:
        capacity = sum(list(accumulate(sorted(shares)))[-concurrency:]) / len(shares)
    else:
        capacity = fmean(_shortest_remaining_first([program.start_s for program in workload.programs], shares))
    alone = fmean(chain.alone_s(fixed_s) for _, chain in works)
    return max(capacity, alone + fmean(chain.pause_s for _, chain in works))


def _works(workload: Workload, hardware: Hardware) -> list[tuple[_Work, _Work]]:
    """Of each program, all of its work and that of its longest chain."""
    salts = Counter(program.salt for program in workload.programs)
    owners = Counter(
        (program.salt, block) for program in workload.programs if salts[program.salt] > 1 for block in _blocks(program)
    )
    works = []
    for program in workload.programs:
        shared = {block for block in _blocks(program) if owners[program.salt, block] > 1} if owners else set()
        works.append(_work(program, workload.block_tokens, hardware, shared))
    return works


def _work(program: ProgramSpec, block_tokens: int, hardware: Hardware, seen: set[int]) -> tuple[_Work, _Work]:
    """`seen` are blocks that somebody else may compute."""
    step, total, chains = hardware.step, _Work(), list[_Work]()
    before: dict[str, tuple[Blocks, int]] = {}

    def seconds(chain: _Work) -> float:
        return chain.alone_s(step.fixed_s) + chain.pause_s

    for index, call in enumerate(program.calls):
        last, generated = before.get(call.stream, (Blocks(), 0))
        prompt = call.prompt.part(0, -(-call.prompt_tokens // block_tokens))
        fresh = [block for block in prompt.part(_common(last, prompt), len(prompt)) if block not in seen]
        new = min(max(1, len(fresh) * block_tokens - generated - block_tokens), call.prompt_tokens)
        count = call.output_tokens - 1
        prefill_s = step.per_token_s * (new + count) + step.per_pair_s * pairs(call.prompt_tokens - new, new)
        decode_s = step.per_context_token_s * (count * call.prompt_tokens + count * (count + 1) / 2)
        steps = -(-new // hardware.step_tokens) + count
        total = total.and_then(prefill_s, decode_s, steps, program.pause_s(index))
        longest = max((chains[other] for other in program.waits_for(index)), key=seconds, default=_Work())
        chains.append(longest.and_then(prefill_s, decode_s, steps, program.pause_s(index)))
        seen.update(fresh)
        before[call.stream] = prompt, call.output_tokens
    return total, max(chains, key=seconds)


def _most_at_once(program: ProgramSpec) -> int:
    """Calls of the program that may run at one time, at most."""
    in_turn = all(call.after is None for call in program.calls)
    return 1 if in_turn else len(program.calls)


def _blocks(program: ProgramSpec) -> set[int]:
    return {block for call in program.calls for block in call.prompt}


def _common(one: Blocks, other: Blocks) -> int:
    """Number of leading blocks that two prompts have in common."""
    length = 0
    for (start, count), (other_start, other_count) in zip(one.runs, other.runs, strict=False):
        if start != other_start:
            break
        length += min(count, other_count)
        if count != other_count:
            break
    return length


def _shortest_remaining_first(starts: Sequence[float], works: Sequence[float]) -> list[float]:
    """Seconds from start to end of each job on one server, which turns to a job that comes if that is shorter."""
    arrivals = sorted(zip(starts, works, strict=True))
    left: list[tuple[float, float]] = []
    now, index, flows = 0.0, 0, []
    while index < len(arrivals) or left:
        if not left:
            now = max(now, arrivals[index][0])
        while index < len(arrivals) and arrivals[index][0] <= now:
            start, work = arrivals[index]
            heapq.heappush(left, (work, start))
            index += 1
        remaining, start = heapq.heappop(left)
        until = arrivals[index][0] if index < len(arrivals) else float("inf")
        if now + remaining <= until:
            now += remaining
            flows.append(now - start)
        else:
            heapq.heappush(left, (remaining - (until - now), start))
            now = until
    return flows
