"""A program while it runs: its graph by state, in place on a terminal, a line for each event elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from treadle.dsl.node import Node
from treadle.runtime.cli.console import error_console, note
from treadle.runtime.local import LocalRuntime

if TYPE_CHECKING:
    from rich.table import Table

REFRESH_S = 0.1
MAX_ROWS = 24
_MARKS = {"pending": "·", "running": "▶", "done": "✓", "failed": "✗", "cancelled": "-"}
_STYLES = {"pending": "dim", "running": "bold yellow", "done": "green", "failed": "bold red", "cancelled": "dim"}


@contextlib.contextmanager
def watching(runtime: LocalRuntime, *, quiet: bool = False) -> Iterator[None]:
    """Shows the runtime's programs on standard error while the scope lasts."""
    if quiet:
        yield
    elif sys.stderr.isatty():
        with _live_table(runtime):
            yield
    else:
        with runtime.watch(_line):
            yield


def _line(node: Node) -> None:
    """What happened to a node, as a plain line."""
    if node.kind == "gather":
        return
    took = ""
    if node.started_at is not None and node.finished_at is not None:
        took = f" in {node.finished_at - node.started_at:.2f} s"
    error = f": {node.error}" if node.error is not None else ""
    note(f"{node.program.name}: {node.name} {node.state}{took}{error}")


@contextlib.contextmanager
def _live_table(runtime: LocalRuntime) -> Iterator[None]:
    from rich.live import Live

    with Live(_table(runtime, 0.0), console=error_console(), auto_refresh=False) as live:
        ended = threading.Event()

        def refresh() -> None:
            started, begun = time.monotonic(), runtime.tokens_generated
            while not ended.wait(REFRESH_S):
                rate = (runtime.tokens_generated - begun) / (time.monotonic() - started)
                live.update(_table(runtime, rate), refresh=True)

        thread = threading.Thread(target=refresh, name="treadle-live", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            live.update(_table(runtime, 0.0), refresh=True)


def _table(runtime: LocalRuntime, rate: float) -> Table:
    from rich.table import Table

    nodes = [node for program in list(runtime.programs) for node in program.graph.nodes() if node.kind != "gather"]
    title = f"{runtime.name}  {rate:.0f} tokens/s" if rate else runtime.name
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
    for node in nodes[-MAX_ROWS:]:
        style = _STYLES[node.state]
        needs = ", ".join(dict.fromkeys(source.name for source in node.inputs))
        table.add_row(
            f"[{style}]{_MARKS[node.state]} {node.name}[/]",
            node.kind,
            f"[dim]← {needs}[/]" if needs else "",
            _seconds(node),
        )
    if len(nodes) > MAX_ROWS:
        table.add_row(f"[dim]and {len(nodes) - MAX_ROWS} before[/]", "", "", "")
    return table


def _seconds(node: Node) -> str:
    if node.started_at is None:
        return ""
    return f"{(node.finished_at or time.monotonic()) - node.started_at:.1f} s"
