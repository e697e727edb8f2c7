"""What deciding costs: microseconds of `Scheduler.plan` and `Scheduler.complete` for each step, by policy.

    python benchmarks/scheduler_overhead.py

64 calls of 2,000 tokens run and decode, 2,000 more wait for a slot; no model and no engine, only the scheduler. The
policies take turns, each with a fresh scheduler, and the ratio is that of the medians to `fcfs+lru+greedy`. Python and
one core; other work on the machine shows at once.
"""

from __future__ import annotations

import statistics
import time
from array import array

from report import Report, parser

from treadle.scheduler import OpenProgram, RowOutput, Scheduler, SchedulerConfig, StepResult, SubmitCall

BASELINE = "fcfs+lru+greedy"
POLICIES = (BASELINE, "program-fcfs+lru+greedy", "treadle+treadle+treadle")
PAGE, SLOTS, WAITING, CONTEXT, STEP_S = 16, 64, 2_000, 2_000, 0.05


def main() -> None:
    args = parser(__doc__).parse_args()
    steps, rounds = (20, 1) if args.quick else (300, 5)
    times: dict[str, tuple[list[float], list[float]]] = {policy: ([], []) for policy in POLICIES}
    for _ in range(rounds):
        for policy in POLICIES:
            for total, part in zip(times[policy], measure(policy, steps), strict=True):
                total.extend(part)
    common = {"running": SLOTS, "waiting": WAITING, "context": CONTEXT, "steps": steps * rounds}
    report = Report(common, as_json=args.json)
    baseline = statistics.median(times[BASELINE][0])
    for policy, (plans, completions) in times.items():
        for figure, values in (("plan", plans), ("complete", completions)):
            ranked = sorted(values)
            report.add(f"{figure}_p50_us", 1e6 * statistics.median(ranked), "us", policy=policy)
            report.add(f"{figure}_p99_us", 1e6 * ranked[int(0.99 * len(ranked))], "us", policy=policy)
        report.add("plan_ratio", statistics.median(plans) / baseline, "of fcfs", policy=policy)
    report.finish()


def measure(policy: str, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each `plan` and each `complete` once all slots decode."""
    order, retention, admission = policy.split("+")
    scheduler = Scheduler(
        SchedulerConfig(
            num_pages=SLOTS * (CONTEXT + SLOTS + steps) // PAGE + 2 * SLOTS,
            vocab_size=None,
            max_context=2 * CONTEXT,
            page_size=PAGE,
            num_slots=SLOTS,
            max_step_tokens=2048,
            order=order,
            retention=retention,
            admission=admission,
        )
    )
    now = 0.0
    for index in range(SLOTS + WAITING):
        scheduler.apply(OpenProgram(f"program {index}"), now)
        prompt = array("i", [index]) * CONTEXT
        scheduler.apply(SubmitCall(f"call {index}", f"program {index}", prompt), now)
    plans: list[float] = []
    completions: list[float] = []
    while len(plans) < steps:
        began = time.perf_counter()
        plan = scheduler.plan(now)
        planned = time.perf_counter()
        assert plan is not None
        now += STEP_S
        outputs = tuple(RowOutput(row.call_id, (1,)) for row in plan.rows if row.sample)
        before = time.perf_counter()
        scheduler.complete(StepResult(plan.step_id, STEP_S, outputs), now)
        after = time.perf_counter()
        if len(plan.rows) == SLOTS and plan.num_tokens == SLOTS:
            plans.append(planned - began)
            completions.append(after - before)
    return plans, completions


if __name__ == "__main__":
    main()
