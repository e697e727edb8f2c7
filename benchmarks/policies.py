"""Scheduling policies against each other at the reference point, in the simulator: the tables of docs/scheduling.md.

    python benchmarks/policies.py --trace FILE --half report --seeds 3 --host 0 --host 128GB
    python benchmarks/policies.py --lines FILE... --plot CHARTS.svg

The reference point is an 8B model on an H100-class card, agents in closed loops of N programs on a pool of C tokens,
with pauses cut to 60 s (agents that work alone) and to 300 s (people among them). Every policy has the prefix cache.
A ratio says how many times less than request FCFS with an LRU cache a policy takes: for each point the geometric mean
of the seeds, which are paired, and below them the geometric mean of the points.

That takes hours for a long trace. What `treadle simulate --json` has printed can be given as `--lines` instead. Without
a trace the programs are generated (`benchmarks/generators/agents.py`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from generators.agents import agents
from report import Report, parser

from treadle.runtime.cli.simulate import Size
from treadle.runtime.cli.simulate_chart import check_plotting, draw
from treadle.scheduler.simulator import hardware, presets, traces
from treadle.scheduler.simulator.band import Band, Sample, Study
from treadle.scheduler.simulator.report import Point, Ratio, Result, paired_ratio

ENGINE = "h100-8b"
CLOSED_LOOPS = ((16, 500_000), (16, 1_000_000), (32, 1_000_000), (32, 2_000_000), (64, 2_000_000))
MAX_PAUSES_S = (60.0, 300.0)
BASE = "vllm"
QUICK_LOOPS = ((6, 200_000),)
MEASURES: dict[str, Callable[[Result], float]] = {
    "mean_ratio": lambda result: result.completion_mean_s,
    "p99_ratio": lambda result: result.completion_p99_s,
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What a table is about: the longest pause, and tokens of host memory."""

    max_pause_s: float | None
    host: int


def simulate(args: argparse.Namespace) -> Iterator[Result]:
    """Runs every point and policy."""
    machine = hardware.load(ENGINE)
    total = 8 if args.quick else args.total
    workload = traces.read(args.trace) if args.trace is not None else agents(2 * total)
    policies = tuple(map(presets.policy, dict.fromkeys([BASE, *(args.policy or ["treadle"])])))
    loops = QUICK_LOOPS if args.quick else CLOSED_LOOPS
    for max_pause_s in MAX_PAUSES_S[:1] if args.quick else MAX_PAUSES_S:
        for host in args.host or [Size.parse("0")]:
            points = tuple(Point(pool, host.tokens(machine), programs) for programs, pool in loops)
            sample = Sample(total, args.half, max_pause_s=max_pause_s)
            yield from Band(Study(workload, machine, policies, points, args.seeds, sample)).results()


def load(paths: Iterable[Path]) -> Iterator[Result]:
    """Results that were printed before."""
    for path in paths:
        for line in path.read_text().splitlines():
            yield Result(**json.loads(line))


def add_figures(report: Report, results: Sequence[Result]) -> None:
    """The ratios of every policy to the base at each point, and their geometric means."""
    for setting in dict.fromkeys(Setting(result.max_pause_s, result.host) for result in results):
        rows = [result for result in results if Setting(result.max_pause_s, result.host) == setting]
        points = list(dict.fromkeys(row.point for row in rows))
        for policy in dict.fromkeys(row.policy for row in rows if row.policy != BASE):
            for name, value in MEASURES.items():
                ratios = [ratio_at(point, policy, rows, value) for point in points]
                common = {"policy": policy, "max_pause_s": setting.max_pause_s, "host": setting.host}
                for point, ratio in zip(points, ratios, strict=True):
                    where = {"programs": point.programs, "pool": point.pool, "low": ratio.low, "high": ratio.high}
                    report.add(name, ratio.mean, "x", **common, **where)
                every = [ratio.mean for ratio in ratios]
                report.add(f"{name}_of_all", geometric_mean(every), "x", **common, lowest=min(every))


def ratio_at(point: Point, policy: str, rows: Sequence[Result], value: Callable[[Result], float]) -> Ratio:
    """How many times less than the base's a policy's value is at a point, over the seeds that both have."""
    base, own = (
        {row.seed: value(row) for row in rows if (row.point, row.policy) == (point, p)} for p in (BASE, policy)
    )
    seeds = sorted(base.keys() & own.keys())
    if not seeds:
        raise SystemExit(f"no seed of {policy!r} and {BASE!r} at {point}; give the lines of both")
    return paired_ratio([base[seed] for seed in seeds], [own[seed] for seed in seeds])


def main() -> None:
    options = parser((__doc__ or "").partition("\n")[0])
    options.add_argument("--trace", type=Path, metavar="FILE", help="recorded programs (default: generated ones)")
    options.add_argument("--half", choices=("tune", "report", "all"), default="all", help="programs of one half only")
    options.add_argument("--total", type=int, default=120, help="programs of a simulation (default: 120)")
    options.add_argument("--seeds", type=int, default=1, help="draws of the programs (default: 1)")
    options.add_argument(
        "--host", type=Size.parse, action="append", metavar="SIZE", help="may be repeated (default: 0)"
    )
    options.add_argument("--policy", action="append", metavar="P", help="may be repeated (default: treadle)")
    options.add_argument("--lines", type=Path, nargs="+", metavar="FILE", help="results to read instead")
    options.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw a chart of the first setting")
    args = options.parse_args()
    if args.plot is not None:
        check_plotting(args.plot)
    results = list(load(args.lines) if args.lines else simulate(args))
    first = results[0]
    common = {"trace": first.trace, "half": first.half, "engine": first.engine, "engine_digest": first.engine_digest}
    report = Report({**common, "total": first.total, "base": BASE}, as_json=args.json)
    add_figures(report, results)
    report.finish()
    if args.plot is not None:
        setting = Setting(first.max_pause_s, first.host)
        draw([result for result in results if Setting(result.max_pause_s, result.host) == setting], args.plot)


if __name__ == "__main__":
    main()
