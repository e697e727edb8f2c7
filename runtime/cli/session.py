"""A loaded model for one command: pulled if need be, driven by an event loop that runs only while it is needed."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from treadle.runtime.cli.console import pull_progress, status
from treadle.runtime.cli.options import engine_config
from treadle.runtime.config import cache_dir
from treadle.runtime.local import LocalRuntime, load
from treadle.runtime.models.registry import installed, pull

if TYPE_CHECKING:
    from treadle.runtime.recorder import Recorder


@contextlib.contextmanager
def running(
    args: argparse.Namespace, recorder: Recorder | None = None
) -> Iterator[tuple[asyncio.Runner, LocalRuntime]]:
    """Loads `args.model` in the calling thread, where Ctrl-C can interrupt it.

    Each `Runner.run` is one piece of work that Ctrl-C cancels; between two of them the terminal is the user's.
    Raises as `local` does.
    """
    config = engine_config(args)
    if any(listed.name == args.model and not listed.cached for listed in installed(cache_dir())):
        with pull_progress(args.model) as progress:
            pull(args.model, cache_dir(), progress)
    with status(f"loading {args.model}"):
        runtime = load(args.model, config, pull=False, recorder=recorder)
    with asyncio.Runner() as runner:
        runner.run(runtime.__aenter__())
        try:
            yield runner, runtime
        finally:
            try:
                runner.run(_close(runtime))
            except KeyboardInterrupt:
                runtime.close_engine()  # a second Ctrl-C; a thread inside of torch must not outlive the interpreter
                raise


async def _close(runtime: LocalRuntime) -> None:
    """Ends what a signal left half done, then the engine: a call that outlived its engine would fail unheard."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    await runtime.__aexit__(None, None, None)
