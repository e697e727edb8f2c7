"""What a simulation is summed up to: one flat record for each policy, seed and point, and how two policies compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from treadle.scheduler.simulator.clock import Outcome

WALL_FIELDS = ("scheduler_us_per_step", "scheduler_us_per_plan", "simulated_seconds_per_wall_second")
"""What depends on the machine that simulates; everything else is the same whenever it is run again."""

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
STUDENT_AFTER = 2.12


@dataclass(frozen=True, slots=True)
class Point:
    """How much memory and how much load.

    Attributes:
        pool, host: tokens of KV that the device and the host hold.
        programs: how many run at once, the next one beginning when one ends; None for open arrivals.
        per_hour: how many come in an hour, at random; None in a closed loop, and for arrivals as recorded.
    """

    pool: int
    host: int = 0
    programs: int | None = None
    per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the report.

    Attributes:
        rule: what the policy consists of.
        programs, per_hour, pool, host: those of `Point`.
        total, left_out: programs that ran, and those that had a call too large for the pool.
        completion_*: seconds from a program's beginning to its end.
        excess_mean_s: mean of how much longer programs took than alone.
        slowdown_*: how many times as long as alone.
        fluid_mean_s: the mean completion time that no policy can beat, by capacity or by what programs take alone.
        ttft_*: seconds from a call to its first token.
        hit_rate: share of the tokens of all prompts that was in a cache, on the device or in the host.
        new_tokens: tokens of prompts that their conversations did not have before.
        re_prefilled_tokens: tokens computed again that had been known.
        prefilled, decoded, saved, loaded: tokens computed of prompts, generated, copied to the host, copied back.
        goodput: share of programs that took no longer than `deadline` times what they take alone.
        fairness: Jain's index of how fast programs were compared with alone: 1 if all were slowed down alike.
        busy: share of the time in which the engine had something to do.
        programs_per_hour: how many ended, on average over the whole simulation.
        max_pause_s: longer recorded pauses were cut to it.
        engine_digest: changes when a number of the engine changes.
    """

    policy: str
    seed: int
    programs: int | None
    per_hour: float | None
    pool: int
    host: int
    completion_mean_s: float
    completion_p50_s: float
    completion_p95_s: float
    completion_p99_s: float
    excess_mean_s: float
    slowdown_mean: float
    slowdown_max: float
    fluid_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    hit_rate: float
    new_tokens: int
    re_prefilled_tokens: int
    prefilled: int
    decoded: int
    saved: int
    loaded: int
    deadline: float
    goodput: float
    fairness: float
    busy: float
    programs_per_hour: float
    simulated_s: float
    steps: int
    total: int
    left_out: int
    trace: str
    half: str
    max_pause_s: float | None
    pauses: str
    engine: str
    engine_digest: str
    rule: str
    scheduler_us_per_step: float
    scheduler_us_per_plan: float
    simulated_seconds_per_wall_second: float

    @property
    def point(self) -> Point:
        return Point(self.pool, self.host, self.programs, self.per_hour)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a result comes from: the fields of `Result` that no simulation changes."""

    policy: str
    rule: str
    seed: int
    point: Point
    left_out: int
    trace: str
    half: str
    max_pause_s: float | None
    pauses: str
    engine: str
    engine_digest: str
    deadline: float


def summarise(outcome: Outcome, fluid_mean_s: float, origin: Origin) -> Result:
    """Sums an outcome of one program or more up."""
    completion = [record.ended - record.began for record in outcome.programs]
    alone = [record.alone_s for record in outcome.programs]
    slowdown = [taken / least for taken, least in zip(completion, alone, strict=True)]
    speed = [1 / value for value in slowdown]
    ttft = [seconds for record in outcome.programs for seconds in record.first_token_s]
    computed = outcome.prompt - outcome.cached
    return Result(
        policy=origin.policy,
        seed=origin.seed,
        programs=origin.point.programs,
        per_hour=origin.point.per_hour,
        pool=origin.point.pool,
        host=origin.point.host,
        completion_mean_s=fmean(completion),
        completion_p50_s=percentile(completion, 0.5),
        completion_p95_s=percentile(completion, 0.95),
        completion_p99_s=percentile(completion, 0.99),
        excess_mean_s=fmean(completion) - fmean(alone),
        slowdown_mean=fmean(slowdown),
        slowdown_max=max(slowdown),
        fluid_mean_s=fluid_mean_s,
        ttft_p50_s=percentile(ttft, 0.5),
        ttft_p99_s=percentile(ttft, 0.99),
        hit_rate=outcome.cached / outcome.prompt,
        new_tokens=outcome.new,
        re_prefilled_tokens=max(0, computed - outcome.new) + outcome.re_prefilled,
        prefilled=computed + outcome.re_prefilled,
        decoded=outcome.decoded,
        saved=outcome.saved,
        loaded=outcome.loaded,
        deadline=origin.deadline,
        goodput=fmean(value <= origin.deadline for value in slowdown),
        fairness=sum(speed) ** 2 / (len(speed) * sum(value * value for value in speed)),
        busy=outcome.busy_s / outcome.seconds,
        programs_per_hour=3600 * len(completion) / outcome.seconds,
        simulated_s=outcome.seconds,
        steps=outcome.steps,
        total=len(completion),
        left_out=origin.left_out,
        trace=origin.trace,
        half=origin.half,
        max_pause_s=origin.max_pause_s,
        pauses=origin.pauses,
        engine=origin.engine,
        engine_digest=origin.engine_digest,
        rule=origin.rule,
        scheduler_us_per_step=1e6 * outcome.plan_s / outcome.steps,
        scheduler_us_per_plan=1e6 * outcome.plan_s / outcome.plans,
        simulated_seconds_per_wall_second=outcome.seconds / outcome.wall_s,
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values are, linear between two of them."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A geometric mean of ratios, and its interval of 95 % confidence; a single ratio has no interval."""

    mean: float
    low: float | None = None
    high: float | None = None


def paired_ratio(base: Sequence[float], other: Sequence[float]) -> Ratio:
    """How many times `base` is of `other`, pair by pair: above 1 where the other takes less.

    The interval is Student's, on the logarithms of the ratios.
    """
    logs = [math.log(one / two) for one, two in zip(base, other, strict=True)]
    centre = fmean(logs)
    if len(logs) == 1:
        return Ratio(math.exp(centre))
    degrees = len(logs) - 1
    quantile = STUDENT[degrees - 1] if degrees <= len(STUDENT) else STUDENT_AFTER
    reach = quantile * stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(centre), math.exp(centre - reach), math.exp(centre + reach))
