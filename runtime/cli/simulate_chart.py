"""The charts of `treadle simulate --plot`: what became of programs, over the points of a sweep."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from treadle.runtime.errors import InvalidRequestError
from treadle.scheduler.simulator.report import Point, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS: dict[str, Callable[[Result], float]] = {
    "mean completion time (s)": lambda result: result.completion_mean_s,
    "p99 of completion time (s)": lambda result: result.completion_p99_s,
    "mean slowdown against running alone": lambda result: result.slowdown_mean,
    "share of prompt tokens found in a cache": lambda result: result.hit_rate,
}
FORMATS = (".png", ".svg", ".pdf")


def check_plotting(path: Path) -> None:
    """Says so before hours of simulation if the chart could not be drawn. Raises `InvalidRequestError`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidRequestError("--plot needs matplotlib; install the extra: pip install 'treadle[plot]'")
    if path.suffix not in FORMATS:
        raise InvalidRequestError(f"{path}: a chart cannot be written so; end its name in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise InvalidRequestError(f"{path.parent}: there is no such folder; make it, or give another one")


def draw(results: Sequence[Result], path: Path) -> None:
    """Draws four panels: the mean of the seeds for each policy and point, and the range of the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    first = results[0]
    points = list(dict.fromkeys(result.point for result in results))
    for panel, (title, value) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        _panel(panel, results, points, value)
        panel.set_title(title)
        panel.set_ylim(bottom=0)
    figure.axes[0].legend()
    figure.suptitle(f"{first.trace} on {first.engine}")
    figure.savefig(path)


def _panel(panel: Axes, results: Sequence[Result], points: Sequence[Point], value: Callable[[Result], float]) -> None:
    places = range(len(points))
    for policy in dict.fromkeys(result.policy for result in results):
        seeds = [[value(r) for r in results if r.policy == policy and r.point == point] for point in points]
        (line,) = panel.plot(places, list(map(fmean, seeds)), marker="o", label=policy)
        panel.fill_between(places, list(map(min, seeds)), list(map(max, seeds)), color=line.get_color(), alpha=0.15)
    panel.set_xticks(places, _labels(points))


def _labels(points: Sequence[Point]) -> list[str]:
    """What tells the points apart; all there is to say where there is only one."""
    names = {"pool": "pool {}", "host": "host {}", "programs": "{} at once", "per_hour": "{:g} an hour"}
    values = {name: [getattr(point, name) for point in points] for name in names}
    told = [name for name in names if len(points) == 1 or len(set(values[name])) > 1]
    return [
        "\n".join(
            names[name].format(_short(value) if name in ("pool", "host") else value)
            for name in told
            if (value := getattr(point, name)) is not None
        )
        for point in points
    ]


def _short(tokens: int) -> str:
    """Tokens in three digits: 500K, 1.25M."""
    value, unit = (tokens / 1e6, "M") if tokens >= 999_500 else (tokens / 1e3, "K")
    return f"{value:.3g}{unit}"
