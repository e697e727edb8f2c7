"""The terminal: text that streams, progress that moves on a TTY and is plain lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from treadle.runtime.models.download import Progress, Stage

if TYPE_CHECKING:
    from rich.console import Console

_STAGES: dict[Stage, str] = {
    "wait": "waiting for another pull",
    "download": "downloading",
    "check": "checking",
    "unpack": "unpacking",
}
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), 127, *range(0x80, 0xA0)) if code not in (9, 10)}


def accept_any_text() -> None:
    """Makes the standard streams replace what their encoding cannot hold, where they would raise in mid-answer."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def is_interactive() -> bool:
    """Whether somebody types and reads."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def stream_text(text: str) -> None:
    """Prints generated text at once. A terminal gets no control characters from a model: they would be obeyed."""
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(message: str) -> None:
    """Tells the user something that is not the answer."""
    print(f"treadle: {message}", file=sys.stderr, flush=True)


def error_console() -> Console:
    """A rich console on standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextlib.contextmanager
def status(message: str) -> Iterator[None]:
    """Shows that something takes its time, on a terminal only."""
    if not sys.stderr.isatty():
        yield
        return
    with error_console().status(message):
        yield


@contextlib.contextmanager
def pull_progress(name: str) -> Iterator[Progress]:
    """What to give to `pull`: a bar on a terminal, a line for each stage elsewhere."""
    if not sys.stderr.isatty():
        yield _line_progress(name)
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=error_console()) as bar:
        tasks = {}

        def report(stage: Stage, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(f"{name}: {_STAGES[stage]}")
            bar.update(tasks[stage], completed=done, total=total or None)

        yield report


def _line_progress(name: str) -> Callable[[Stage, int, int], None]:
    last: list[Stage] = []

    def report(stage: Stage, done: int, total: int) -> None:
        if last[-1:] != [stage]:
            last.append(stage)
            note(f"{name}: {_STAGES[stage]}" + (f", {total / 1e6:.0f} MB" if total else ""))

    return report
