"""The tables of `treadle simulate`: two for each point, policies against the first of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from treadle.scheduler.simulator.band import describe
from treadle.scheduler.simulator.report import Ratio, Result, paired_ratio

if TYPE_CHECKING:
    from rich.table import Table

Columns = Mapping[str, Callable[[Result], float]]

WIDTH = 110
"""Characters of a line, where the output is no terminal."""

TIMES: Columns = {
    "mean s": lambda result: result.completion_mean_s,
    "p50 s": lambda result: result.completion_p50_s,
    "p95 s": lambda result: result.completion_p95_s,
    "p99 s": lambda result: result.completion_p99_s,
}
RATED = ("mean s", "p99 s")
CAUSES: Columns = {
    "slowdown": lambda result: result.slowdown_mean,
    "worst": lambda result: result.slowdown_max,
    "in time %": lambda result: 100 * result.goodput,
    "fair": lambda result: result.fairness,
    "TTFT p50 s": lambda result: result.ttft_p50_s,
    "p99 s": lambda result: result.ttft_p99_s,
    "hits %": lambda result: 100 * result.hit_rate,
    "again M": lambda result: result.re_prefilled_tokens / 1e6,
    "us/step": lambda result: result.scheduler_us_per_step,
}
LEGEND = """
mean, p50, p95, p99: seconds from a program's beginning to its end
times less: than with {first}{interval}
fluid: work divided by capacity, or what programs take alone if that is more; no policy is below
slowdown, worst: against running alone, mean and maximum
in time: programs that took at most {deadline:g} times what they take alone
fair: Jain's index of how much programs were slowed down
TTFT: from a call to its first token
hits: tokens of prompts that were found in a cache
again: millions of tokens that had to be computed again
us/step: microseconds that the scheduler planned for a step, on this machine"""


def print_tables(results: Sequence[Result], *, validated: bool) -> None:
    """Prints two tables for each point, and what the columns mean."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH
    first = results[0]
    seeds = len({result.seed for result in results})
    engine = f"{first.engine} ({first.engine_digest}), {'' if validated else 'not '}validated"
    console.print(f"{first.trace}, half {first.half}, pauses {first.pauses}; engine {engine}")
    for point in dict.fromkeys(result.point for result in results):
        rows = [result for result in results if result.point == point]
        drawn = f"{rows[0].total} programs" + (f", {seeds} times" if seeds > 1 else "")
        console.print(f"\n{describe(point)}: {drawn}; {rows[0].left_out} are too large for the pool")
        of = {policy: [row for row in rows if row.policy == policy] for policy in dict.fromkeys(r.policy for r in rows)}
        console.print(_times(of), "", _causes(of), sep="\n")
    interval = ", geometric mean and 95 % interval" if seeds > 1 else ""
    console.print(LEGEND.format(deadline=first.deadline, first=first.policy, interval=interval))


def _times(of: Mapping[str, Sequence[Result]]) -> Table:
    """Completion times with their ratios to the first policy's, and the bound."""
    names = [name for column in TIMES for name in ((column, "times less") if column in RATED else (column,))]
    table = _table(names)
    base = next(iter(of.values()))
    for policy, own in of.items():
        cells = []
        for name, value in TIMES.items():
            cells.append(_mean(value, own))
            if name in RATED:
                cells.append("" if own is base else _ratio(paired_ratio(list(map(value, base)), list(map(value, own)))))
        table.add_row(policy, *cells)
    bound = [result.fluid_mean_s for result in base]
    ratio = paired_ratio([result.completion_mean_s for result in base], bound)
    table.add_row("fluid", _mean(lambda result: result.fluid_mean_s, base), _ratio(ratio), style="dim")
    return table


def _causes(of: Mapping[str, Sequence[Result]]) -> Table:
    table = _table(list(CAUSES))
    for policy, own in of.items():
        table.add_row(policy, *(_mean(value, own) for value in CAUSES.values()))
    return table


def _table(columns: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("policy", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _mean(value: Callable[[Result], float], results: Sequence[Result]) -> str:
    mean = fmean(map(value, results))
    return f"{mean:,.0f}" if mean >= 1000 else f"{mean:.3g}"


def _ratio(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.mean:.2f}"
    return f"{ratio.mean:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"
