"""A study: policies against each other, seed by seed, over points of memory and load."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from treadle.scheduler.simulator import arrivals, hardware
from treadle.scheduler.simulator.bound import fluid_mean_s
from treadle.scheduler.simulator.clock import Setup, Simulation
from treadle.scheduler.simulator.hardware import Hardware
from treadle.scheduler.simulator.pauses import redraw
from treadle.scheduler.simulator.presets import Policy
from treadle.scheduler.simulator.report import Origin, Point, Result, summarise
from treadle.scheduler.simulator.workload import Half, Workload, cap_pauses, clip, half, largest_call_tokens, select


@dataclass(frozen=True, slots=True)
class Sample:
    """Which programs of a trace are run.

    Attributes:
        total: how many, drawn by seed; fewer if there are not so many.
        half: those of one half, by the hash of their ids.
        max_calls, max_tokens: programs lose the calls, and calls the tokens, that go beyond.
        max_pause_s: longer recorded pauses are cut to it, before others are drawn in their place.
        pauses: see `redraw`.
    """

    total: int = 120
    half: Half | Literal["all"] = "all"
    max_calls: int = 80
    max_tokens: int = 150_000
    max_pause_s: float | None = None
    pauses: str = "recorded"


@dataclass(frozen=True, slots=True)
class Study:
    """Everything that decides the results.

    Attributes:
        recorded: programs start as in the trace; `programs` and `per_hour` of the points are None then.
        deadline: a program is in time within this many times what it takes alone.
    """

    workload: Workload
    hardware: Hardware
    policies: tuple[Policy, ...]
    points: tuple[Point, ...]
    num_seeds: int = 1
    sample: Sample = Sample()
    recorded: bool = False
    deadline: float = 2.0


class Band:
    """A study that can be run.

    Raises:
        ValueError: no program is left at some point, or the pauses cannot be drawn.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self._prepared = prepare(study.workload, study.sample)
        self._redraw = redraw(study.sample.pauses, self._prepared.programs)
        self._fitting = {point: self._fit(point) for point in study.points}

    def __len__(self) -> int:
        """Number of simulations."""
        return len(self.study.points) * self.study.num_seeds * len(self.study.policies)

    def results(
        self, watch: Callable[[str], object] = lambda _: None, stopwatch: Callable[[], float] = lambda: math.nan
    ) -> Iterator[Result]:
        """Simulates each policy with each seed at each point; `watch` is told what comes next, `stopwatch` times it.

        A seed means the same programs in the same order, with the same pauses and arrivals, for every policy.
        """
        study = self.study
        for point in study.points:
            for seed in range(study.num_seeds):
                workload = self.draw(point, seed)
                fluid = fluid_mean_s(workload, study.hardware, point.programs)
                for policy in study.policies:
                    watch(f"{policy.name}, seed {seed + 1} of {study.num_seeds}, {describe(point)}")
                    outcome = Simulation(workload, _setup(study.hardware, point, policy), stopwatch).run()
                    yield summarise(outcome, fluid, self._origin(policy, point, seed))

    def draw(self, point: Point, seed: int) -> Workload:
        """The programs of a seed, in the order in which they start, with the times at which they do in open arrivals.

        Unless as recorded, the order is drawn too: neighbours in a trace are often alike.
        """
        fitting = self._fitting[point]
        drawn = select(fitting, seed, min(self.study.sample.total, len(fitting.programs)))
        programs = tuple(self._redraw(program, seed) for program in drawn.programs)
        if self.study.recorded:
            return replace(drawn, programs=arrivals.recorded(programs))
        programs = tuple(random.Random(f"order, seed {seed}").sample(programs, len(programs)))
        if point.per_hour is not None:
            programs = arrivals.poisson(programs, point.per_hour, random.Random(f"arrivals, seed {seed}"))
        return replace(drawn, programs=programs)

    def _fit(self, point: Point) -> Workload:
        """The programs of which no call needs more than half of the pool."""
        every = self._prepared.programs
        fitting = tuple(program for program in every if largest_call_tokens([program]) * 2 <= point.pool)
        if not fitting:
            which = f"{self.study.workload.name}, half {self.study.sample.half}"
            text = f"none of {len(every)} programs has all its calls within half of a pool of {point.pool} tokens"
            raise ValueError(f"{which}: {text}; take a larger pool, or other programs")
        return replace(self._prepared, programs=fitting)

    def _origin(self, policy: Policy, point: Point, seed: int) -> Origin:
        study = self.study
        return Origin(
            policy=policy.name,
            rule=policy.rule,
            seed=seed,
            point=point,
            left_out=len(self._prepared.programs) - len(self._fitting[point].programs),
            trace=study.workload.name,
            half=study.sample.half,
            max_pause_s=study.sample.max_pause_s,
            pauses=study.sample.pauses,
            engine=study.hardware.name,
            engine_digest=hardware.digest(study.hardware),
            deadline=study.deadline,
        )


def prepare(workload: Workload, sample: Sample) -> Workload:
    """The programs that may be drawn, clipped."""
    programs = (program for program in workload.programs if sample.half in ("all", half(program.id)))
    clipped = (clip(program, sample.max_calls, sample.max_tokens) for program in programs)
    if sample.max_pause_s is not None:
        limit = sample.max_pause_s
        clipped = (cap_pauses(program, limit) for program in clipped)
    return replace(workload, programs=tuple(clipped))


def describe(point: Point) -> str:
    """A point in words."""
    words = [f"pool {point.pool:,}"]
    if point.host:
        words.append(f"host {point.host:,}")
    if point.programs is not None:
        words.append(f"{point.programs} programs at once")
    if point.per_hour is not None:
        words.append(f"{point.per_hour:g} programs an hour")
    return ", ".join(words)


def _setup(machine: Hardware, point: Point, policy: Policy) -> Setup:
    return Setup(
        machine,
        pool_tokens=point.pool,
        host_tokens=point.host,
        order=policy.order,
        retention=policy.retention,
        admission=policy.admission,
        concurrency=point.programs,
        clairvoyant=policy.clairvoyant,
    )
