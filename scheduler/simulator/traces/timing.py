"""Published figures of time without programs: how long tools run, and how often requests come."""

from __future__ import annotations

import bisect
import csv
import difflib
import math
import random
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from treadle.scheduler.simulator.traces.files import Record, TraceError, lines


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Seconds of one tool, as `(share, seconds)` points with rising shares, and how many runs they were taken from."""

    count: int
    points: tuple[tuple[float, float], ...]

    def at(self, share: float) -> float:
        """The inverse distribution function. Between two points the logarithm is linear; outside, the last point holds.

        So nothing is below the lowest quantile or above the highest, and the tail beyond it is left out.
        """
        shares = [point[0] for point in self.points]
        index = bisect.bisect_left(shares, share)
        if index in (0, len(shares)):
            return self.points[min(index, len(shares) - 1)][1]
        (low, begin), (high, end) = self.points[index - 1], self.points[index]
        part = (share - low) / (high - low)
        return float(math.exp(math.log(begin) * (1 - part) + math.log(end) * part))


@dataclass(frozen=True, slots=True)
class PauseTable:
    """Seconds that tools run, by name of the tool, drawn from published quantiles."""

    tools: dict[str, Quantiles]

    @classmethod
    def read(cls, path: Path) -> PauseTable:
        """A table from JSON: ``{"unit": "seconds", "tools": {NAME: {"count": ..., "p5": ..., ..., "p99": ...}}}``.

        Such quantiles can be computed from the measurements of eunomia-bpf/agentcgroup.

        Raises:
            TraceError: the file is not there, or not that.
        """
        text = "\n".join(line.text for line in lines(path))
        record = Record.json(str(path), text)
        if record.text("unit") != "seconds":
            raise record.error("unit", "seconds")
        tools = Record.of(f"{path}: tools", record.data.get("tools"))
        return cls({name: _quantiles(Record.of(f"{path}: {name}", value)) for name, value in tools.data.items()})

    def sample(self, rng: random.Random, tool: str) -> float:
        """Seconds of one run of a tool. The empty name is any tool, each as often as it was measured.

        Raises:
            ValueError: the table does not have the tool.
        """
        if not tool:
            names, counts = list(self.tools), [quantiles.count for quantiles in self.tools.values()]
            tool = rng.choices(names, counts)[0]
        if tool not in self.tools:
            near = difflib.get_close_matches(tool, self.tools, n=3, cutoff=0.3) or sorted(self.tools)
            raise ValueError(f"no latencies of a tool {tool!r}; nearest: {', '.join(near)}")
        return self.tools[tool].at(rng.random())


def _quantiles(record: Record) -> Quantiles:
    shares = sorted((int(name[1:]), name) for name in record.data if name[:1] == "p" and name[1:].isdecimal())
    points = tuple((share / 100, record.number(name)) for share, name in shares)
    seconds = [point[1] for point in points]
    if len(points) < 2 or seconds != sorted(seconds) or seconds[0] <= 0 or not 0 < points[0][0] <= points[-1][0] < 1:
        raise TraceError(f"{record.where}: expected two or more quantiles above 0 that rise, like p5, p50 and p95")
    return Quantiles(record.integer("count"), points)


@dataclass(frozen=True, slots=True)
class ArrivalRate:
    """Requests a second as a function of time, constant in each window of `window_s` seconds; 0 after the last."""

    window_s: float
    rates: tuple[float, ...]

    @property
    def duration_s(self) -> float:
        return self.window_s * len(self.rates)

    @property
    def expected(self) -> float:
        """Requests to be expected in all."""
        return self.window_s * sum(self.rates)

    def at(self, seconds: float) -> float:
        """The rate at a time."""
        index = math.floor(seconds / self.window_s)
        return self.rates[index] if 0 <= index < len(self.rates) else 0.0

    def time_of(self, expected: float) -> float:
        """The first time by which so many requests are to be expected.

        Raises:
            ValueError: fewer are to be expected in all.
        """
        sums = [0.0, *accumulate(rate * self.window_s for rate in self.rates)]
        index = bisect.bisect_left(sums, expected) - 1
        if index < 0:
            return 0.0
        if index >= len(self.rates):
            raise ValueError(f"{sums[-1]:.0f} requests are to be expected in all, not {expected:.0f}")
        return index * self.window_s + (expected - sums[index]) / self.rates[index]


def read_rates(path: Path) -> ArrivalRate:
    """The rate of all clients together, from alibaba/ServeGen (`data/*/*/*-trace.csv`, put together).

    Columns: client, window_start_s, rate_rps, and the fitted distribution of gaps, which is left out. The published
    files have no lengths of prompts and outputs, so they make no workload of their own.

    Raises:
        TraceError: the file is not there, or not that.
    """
    rates: dict[float, float] = {}
    header: list[str] = []
    for line in lines(path):
        cells = next(csv.reader([line.text]))
        if not header:
            header = cells
            if not {"window_start_s", "rate_rps"} <= set(header):
                raise TraceError(f"{line.where}: expected the columns window_start_s and rate_rps")
            continue
        row = dict(zip(header, cells, strict=False))
        try:
            start_s, rate = float(row["window_start_s"]), float(row["rate_rps"])
        except (KeyError, ValueError):
            raise TraceError(f"{line.where}: window_start_s and rate_rps must be numbers") from None
        if not (0 <= start_s < math.inf and 0 <= rate < math.inf):
            raise TraceError(f"{line.where}: window_start_s and rate_rps must be numbers of at least 0")
        rates[start_s] = rates.get(start_s, 0.0) + rate
    return _from_windows(rates, str(path))


def _from_windows(rates: dict[float, float], where: str) -> ArrivalRate:
    starts = sorted(rates)
    if len(starts) < 2:
        raise TraceError(f"{where}: expected two windows or more")
    window_s = min(after - before for before, after in pairwise(starts))
    if any(start % window_s for start in starts) or starts[-1] / window_s > 1_000_000:
        raise TraceError(f"{where}: the windows are not of one length")
    return ArrivalRate(
        window_s, tuple(rates.get(index * window_s, 0.0) for index in range(int(starts[-1] / window_s) + 1))
    )
