"""What a step of a live engine costs: it takes steps of many shapes, and a line is laid through their times."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from treadle.kernels import reference as ops
from treadle.runtime.engine.engine import Engine
from treadle.scheduler import AbortCall, Command, EndProgram, OpenProgram, SamplingParams, StepPlan, SubmitCall
from treadle.scheduler.simulator import CopyCost, StepCost
from treadle.scheduler.simulator.hardware import pairs

Timer: TypeAlias = Callable[[], float]
PROGRAM = "calibration"
TIMERS: Mapping[str, Timer] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds of the clock on the wall, or of the processor's work for this process. Others that want the same cores are
in the first; the second is of use with one thread only, because it adds up what several do at once."""
GREEDY = SamplingParams(temperature=0.0)
ENDLESS = 1 << 30


@dataclass(frozen=True, slots=True)
class Work:
    """What a step computes, as `StepCost` counts it, and its rows."""

    new_tokens: int
    pairs: int
    context: int
    rows: int

    @classmethod
    def of(cls, plan: StepPlan) -> Work:
        long_rows = [row for row in plan.rows if row.count > 1]
        context = sum(row.end for row in plan.rows if row.count == 1)
        return cls(plan.num_tokens, sum(pairs(row.start, row.count) for row in long_rows), context, len(plan.rows))


@dataclass(frozen=True, slots=True)
class Sample:
    """A step, or the middle one of several that are alike: its work and its seconds."""

    work: Work
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Costs, and how far the samples lie from them: of absolute relative errors the mean and the largest."""

    step: StepCost
    mean_error: float
    largest_error: float


class Stopwatch:
    """An engine whose steps are timed by `timer`, each with the plan that it carried out."""

    def __init__(self, engine: Engine, vocab_size: int, timer: Timer) -> None:
        self._engine = engine
        self._timer = timer
        self._random = random.Random(0)
        self._vocab_size = vocab_size
        self._numbers = itertools.count()
        self._plan: StepPlan | None = None
        self._write = engine.runner.state.write
        engine.runner.state.write = self._remember  # type: ignore[method-assign]
        self._send(OpenProgram(PROGRAM))

    def close(self) -> None:
        """Leaves the engine as it was found."""
        self._send(EndProgram(PROGRAM))
        self._engine.runner.state.write = self._write  # type: ignore[method-assign]

    def decode(self, batch: int, context: int, steps: int) -> Sample:
        """Steps in which `batch` rows decode, at about that context."""
        ids = self._submit([self._prompt(context) for _ in range(batch)], ENDLESS)
        self._until_all_decode(batch)
        found = [self._step() for _ in range(steps)]
        self._abort(ids)
        return _middle(found)

    def prefill(self, start: int, count: int, repeats: int, *, batch: int = 0, context: int = 0) -> Iterator[Sample]:
        """Steps that compute up to `count` tokens from position `start` on, while `batch` rows decode at that context.

        Each computes another number of tokens, as prompts do: a number that was seen before is faster by a tenth.
        """
        ids = self._submit([self._prompt(context) for _ in range(batch)], ENDLESS)
        self._until_all_decode(batch)
        for length in self._random.sample(range(count - count // 4, count + 1), min(repeats, count // 4 + 1)):
            prompt = self._prompt(start)
            if start:
                self._run_to_end(prompt)
            self._submit([[*prompt, *self._prompt(length)]], 1)
            plan, seconds = self._step()
            while not any(row.count == length for row in plan.rows):
                plan, seconds = self._step()
            yield Sample(Work.of(plan), seconds)
        self._abort(ids)

    def _until_all_decode(self, batch: int) -> None:
        """Takes steps until every row decodes."""
        while batch:
            rows = self._step()[0].rows
            if len(rows) == batch and all(row.count == 1 for row in rows):
                return

    def _run_to_end(self, prompt: list[int]) -> None:
        (call_id,) = self._submit([prompt], 1)
        while not any(row.call_id == call_id and row.sample for row in self._step()[0].rows):
            pass

    def _step(self) -> tuple[StepPlan, float]:
        began = self._timer()
        events = self._engine.step()
        seconds = self._timer() - began
        assert events is not None and self._plan is not None
        return self._plan, seconds

    def _remember(self, plan: StepPlan) -> None:
        self._plan = plan
        self._write(plan)

    def _prompt(self, length: int) -> list[int]:
        return [self._random.randrange(self._vocab_size) for _ in range(length)]

    def _submit(self, prompts: Sequence[list[int]], new_tokens: int) -> list[str]:
        longest = self._engine.scheduler.limits.max_context
        ids = [f"{PROGRAM}-{next(self._numbers)}" for _ in prompts]
        calls = zip(ids, prompts, strict=True)
        self._send(
            *(SubmitCall(i, PROGRAM, prompt, GREEDY, min(new_tokens, longest - len(prompt))) for i, prompt in calls)
        )
        return ids

    def _abort(self, ids: Iterable[str]) -> None:
        self._send(*(AbortCall(call_id) for call_id in ids))

    def _send(self, *commands: Command) -> None:
        events = self._engine.apply(commands)
        assert all(getattr(event, "error", None) is None for event in events), events


def _middle(found: Sequence[tuple[StepPlan, float]]) -> Sample:
    works = [Work.of(plan) for plan, _ in found]
    context = round(statistics.mean(work.context for work in works))
    first = works[0]
    work = Work(first.new_tokens, first.pairs, context, first.rows)
    return Sample(work, statistics.median(seconds for _, seconds in found))


def measure_steps(engine: Engine, vocab_size: int, timer: Timer, *, quick: bool = False) -> Iterator[Sample]:
    """Steps of decoding rows, of prefill, and of both at once, as far as context, slots and steps of the engine go."""
    config, watch = engine.scheduler.config, Stopwatch(engine, vocab_size, timer)
    longest = engine.scheduler.limits.max_context
    batches, contexts = ((1, 4), (16, 64)) if quick else ((1, 2, 4, 8, 16, 32), (32, 128, 512, 1024))
    counts, starts = ((8, 32), (0, 64)) if quick else ((8, 32, 64, 128, 256, 512), (0, 256, 1024))
    steps, repeats = (3, 1) if quick else (12, 5)
    list(watch.prefill(0, counts[0], 1))
    for context in contexts:
        for batch in batches:
            room = batch * (context + steps + 2 + config.page_size) < config.num_pages * config.page_size // 2
            if batch <= config.num_slots and context + steps + 2 < longest and room:
                yield watch.decode(batch, context, steps)
    for start in starts:
        for count in counts:
            if count <= config.max_step_tokens and start + count + 1 < longest:
                yield from watch.prefill(start, count, repeats)
                if count <= 128 and count + 8 <= config.max_step_tokens:
                    yield from watch.prefill(start, count, repeats, batch=4, context=contexts[1])
    watch.close()


def fit(samples: Sequence[Sample]) -> Fit:
    """Least squares of relative errors. A cost that comes out below zero is left out, and the others fitted again."""
    works = [sample.work for sample in samples]
    seconds = np.array([sample.seconds for sample in samples])
    columns = np.array([[1, work.new_tokens, work.pairs, work.context] for work in works], dtype=float)
    relative, used, values = columns / seconds[:, None], [0, 1, 2, 3], np.zeros(4)
    while True:
        values[:] = 0
        scale = relative[:, used].max(axis=0)
        values[used] = np.linalg.lstsq(relative[:, used] / scale, np.ones(len(samples)), rcond=None)[0] / scale
        if (values >= 0).all():
            break
        used.remove(int(values.argmin()))
    errors = np.abs(relative @ values - 1)
    return Fit(StepCost(*map(float, values)), float(errors.mean()), float(errors.max()))


def measure_copies(engine: Engine, timer: Timer, *, quick: bool = False) -> CopyCost:
    """Copies of pages between two arenas in memory, as the engine makes them. Both ways are the same here."""
    kv = engine.runner.state.kv
    size = kv[:, :, 0].nbytes
    few, many = 1, min(16 if quick else 128, kv.shape[2] // 2)
    other = torch.zeros_like(kv[:, :, :many])

    def seconds(count: int) -> float:
        times = []
        for _ in range(3 if quick else 15):
            sources, targets = torch.randperm(kv.shape[2])[:count], torch.randperm(many)[:count]
            began = timer()
            ops.copy_pages(kv, other, sources, targets)
            times.append(timer() - began)
        return statistics.median(times[1:])

    one, all_of_them = seconds(few), seconds(many)
    a_page = max((all_of_them - one) / (many - few), 1e-9)
    return CopyCost(size / a_page, size / a_page, max(0.0, one - a_page))
