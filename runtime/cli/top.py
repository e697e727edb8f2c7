"""`treadle top`: a running server at a glance, again and again: pages, requests, tokens, programs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.runtime.cli.options import Commands
from treadle.runtime.cli.remote import Remote, RemoteError, add_remote_options, doing, duration, printable, remote_of

if TYPE_CHECKING:
    from rich.console import RenderableType

HELP = "watch a running server"
MOST_ROWS = 1000
BAR_CELLS = 24
STYLES = {"running": "bold yellow", "tool": "cyan", "person": "dim", "idle": "dim"}
PAGES = ("running", "leased", "cached", "free")


@dataclass(frozen=True, slots=True)
class Counts:
    """What the server's metrics say, as far as the key may read them: a value for each name and label."""

    time: float
    values: Mapping[tuple[str, str], float]

    def get(self, name: str, label: str = "") -> float | None:
        return self.values.get((f"treadle_{name}", label))

    def rate(self, before: Counts | None, name: str) -> float | None:
        """What a counter grew by in a second."""
        now = self.get(name)
        then = before.get(name) if before is not None else None
        if now is None or then is None or before is None or self.time <= before.time:
            return None
        return max(0.0, now - then) / (self.time - before.time)


def add_command(commands: Commands) -> None:
    """Adds `top` to the commands."""
    parser = commands.add_parser("top", help=HELP, description="Watches a running server until Ctrl-C.")
    add_remote_options(parser)
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between looks (default: 1)")
    parser.add_argument("--once", action="store_true", help="look once; so it is where the output is no terminal")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Shows the server, in place on a terminal."""
    from rich.console import Console
    from rich.live import Live

    remote, console, interval = remote_of(args), Console(), max(0.1, args.interval)
    counts = _counts(remote)
    if args.once or not sys.stdout.isatty():
        console.print(_frame(remote, counts, None, MOST_ROWS))
        return 0
    before: Counts | None = None
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(_frame(remote, counts, before, max(1, console.height - 6)), refresh=True)
                time.sleep(interval)
                before, counts = counts, _counts(remote)
    except KeyboardInterrupt:
        return 0


def _counts(remote: Remote) -> Counts:
    """Reads the metrics. Where the key may not, there are none."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        text = remote.text("/metrics")
    except RemoteError:
        return Counts(time.monotonic(), {})
    values: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            label = next(iter(sample.labels.values()), "") if len(sample.labels) < 2 else ""
            values[sample.name, label] = values.get((sample.name, label), 0.0) + sample.value
    return Counts(time.monotonic(), values)


def _frame(remote: Remote, counts: Counts, before: Counts | None, most_rows: int) -> RenderableType:
    """One look at the server."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    listed = remote.json("/v1/programs", limit=MOST_ROWS)
    programs: Sequence[Mapping[str, Any]] = listed["data"]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("program", "turns", "age", "does"):
        table.add_column(column, justify="right" if column in ("turns", "age") else "left", no_wrap=True)
    for program in programs[:most_rows]:
        what = Text(doing(program), STYLES[program["state"]])
        table.add_row(Text(printable(program["id"])), str(program["turns"]), duration(program["age_s"]), what)
    count = f"{len(programs)}+" if listed["has_more"] else str(len(programs))
    hidden = len(programs) - most_rows
    rest = [Text(f"and {hidden} more", "dim")] if hidden > 0 else []
    return Group(
        Text(_headline(remote, counts, before, count), "bold"),
        *_engine(counts),
        "",
        table,
        *rest,
    )


def _headline(remote: Remote, counts: Counts, before: Counts | None, num_programs: str) -> str:
    parts = [remote.url, f"{num_programs} programs"]
    rate = counts.rate(before, "generated_tokens_total")
    if rate is not None:
        parts.append(f"{rate:.0f} tokens/s")
    running, waiting = counts.get("live_requests", "running"), counts.get("live_requests", "waiting")
    if running is not None and waiting is not None:
        parts.append(f"{running:.0f} requests run, {waiting:.0f} wait")
    return "   ".join(parts)


def _engine(counts: Counts) -> list[RenderableType]:
    """A bar of all pages by what they are held for."""
    from rich.text import Text

    pages = {state: counts.get("kv_pages", state) for state in PAGES}
    known = {state: value for state, value in pages.items() if value is not None}
    total = sum(known.values())
    if not total:
        return []
    bar = Text(no_wrap=True)
    for (state, value), style in zip(known.items(), ("yellow", "cyan", "blue", "dim"), strict=False):
        bar.append(("\u2588" if state != "free" else "\u2591") * round(BAR_CELLS * value / total), style)
    said = ", ".join(f"{value:.0f} {state}" for state, value in known.items())
    return [bar.append(f"  pages: {said}", "")]
