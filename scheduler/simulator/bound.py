"""The fluid lower bound: what no policy can beat, because the work has to be done.

An engine that loses nothing, computes nothing twice and fills every step still needs some seconds for each program. A
single server that works them off in the best order cannot be beaten in mean completion time:

- Closed loop of C programs. The programs' ends t(1) <= t(2) <= ... are also the beginnings of all but the first C. So
  the completion times add up to the last C ends, and the k-th end is not before the k smallest works are done.
- Open arrivals. Shortest remaining work first is the best order (Schrage 1968).

Nor can a program be faster than it is with a server and its pauses to itself.
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
    """What a program needs at least: seconds for its tokens, and rows in so many steps."""

    tokens_s: float
    steps: int


def fluid_mean_s(workload: Workload, hardware: Hardware, concurrency: int | None) -> float:
    """Seconds that the mean completion time of the programs cannot be below.

    `concurrency` is that of a closed loop, None with open arrivals.
    """
    works = _works(workload, hardware)
    rows = min(hardware.rows, concurrency or hardware.rows)
    shares = [work.tokens_s + hardware.step.fixed_s * work.steps / rows for work in works]
    if concurrency is not None:
        capacity = sum(list(accumulate(sorted(shares)))[-concurrency:]) / len(shares)
    else:
        capacity = fmean(_shortest_remaining_first([program.start_s for program in workload.programs], shares))
    pauses = fmean(sum(call.pause_s for call in program.calls[1:]) for program in workload.programs)
    alone = fmean(work.tokens_s + hardware.step.fixed_s * work.steps for work in works)
    return max(capacity, alone + pauses)


def _works(workload: Workload, hardware: Hardware) -> list[_Work]:
    salts = Counter(program.salt for program in workload.programs)
    owners = Counter(
        (program.salt, block) for program in workload.programs if salts[program.salt] > 1 for block in _blocks(program)
    )
    works = []
    for program in workload.programs:
        shared = {block for block in _blocks(program) if owners[program.salt, block] > 1} if owners else set()
        works.append(_work(program, workload.block_tokens, hardware, shared))
    return works


def _work(program: ProgramSpec, block_tokens: int, hardware: Hardware, seen: set[int]) -> _Work:
    """`seen` are blocks that somebody else may compute."""
    step, total, steps = hardware.step, 0.0, 0
    before: dict[str, tuple[Blocks, int]] = {}
    for call in program.calls:
        last, generated = before.get(call.stream, (Blocks(), 0))
        prompt = call.prompt.part(0, -(-call.prompt_tokens // block_tokens))
        fresh = [block for block in prompt.part(_common(last, prompt), len(prompt)) if block not in seen]
        new = min(max(1, len(fresh) * block_tokens - generated - block_tokens), call.prompt_tokens)
        count = call.output_tokens - 1
        total += step.per_token_s * (new + count) + step.per_pair_s * pairs(call.prompt_tokens - new, new)
        total += step.per_context_token_s * (count * call.prompt_tokens + count * (count + 1) / 2)
        steps += -(-new // hardware.step_tokens) + count
        seen.update(fresh)
        before[call.stream] = prompt, call.output_tokens
    return _Work(total, steps)


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
