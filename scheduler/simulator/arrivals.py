"""When programs start: at random, as recorded, or at a rate that changes with time. All from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from treadle.scheduler.simulator.traces import ArrivalRate
from treadle.scheduler.simulator.workload import ProgramSpec


def poisson(programs: Sequence[ProgramSpec], per_hour: float, rng: random.Random) -> tuple[ProgramSpec, ...]:
    """Programs in their order, with gaps drawn from an exponential distribution; also before the first.

    Raises:
        ValueError: the rate is not above 0.
    """
    if not 0 < per_hour < float("inf"):
        raise ValueError(f"programs must come at a rate above 0 an hour, not {per_hour}")
    now, started = 0.0, []
    for program in programs:
        now += rng.expovariate(per_hour / 3600)
        started.append(replace(program, start_s=now))
    return tuple(started)


def recorded(programs: Sequence[ProgramSpec]) -> tuple[ProgramSpec, ...]:
    """Programs in the order in which they were recorded to start, the first at 0."""
    begin = min((program.start_s for program in programs), default=0.0)
    moved = (replace(program, start_s=program.start_s - begin) for program in programs)
    return tuple(sorted(moved, key=lambda program: program.start_s))


def at_rate(
    programs: Sequence[ProgramSpec], rate: ArrivalRate, rng: random.Random, per_program: float = 1.0
) -> tuple[ProgramSpec, ...]:
    """Programs in their order as a Poisson process whose rate follows a recorded one.

    `per_program` recorded requests stand for one program: above 1 it thins the load, below 1 it thickens it. Times are
    those of a process of rate 1, put through the inverse of the expected number of arrivals.

    Raises:
        ValueError: the recorded rate ends before the last program comes.
    """
    if not 0 < per_program < float("inf"):
        raise ValueError(f"a program must stand for more than 0 requests, not {per_program}")
    expected, started = 0.0, []
    for program in programs:
        expected += rng.expovariate(1.0)
        started.append(replace(program, start_s=rate.time_of(expected * per_program)))
    return tuple(started)
