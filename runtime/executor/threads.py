"""Synchronous tools in threads of their own: one that hangs holds up nobody, not even the end of the process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from treadle.runtime.threads import run_in_daemon

MAX_THREADS = 64


class ToolThreads:
    """Runs functions in daemon threads, at most `limit` at once.

    A thread cannot be ended from outside: a call that is cancelled is let go, and its thread, until it returns, goes
    on counting against the limit.
    """

    def __init__(self, limit: int = MAX_THREADS) -> None:
        self._free = asyncio.Semaphore(limit)

    async def run(self, function: Callable[[], Any]) -> Any:
        """The function's result; raises what it raises."""
        await self._free.acquire()
        return await run_in_daemon(function, "treadle-tool", ended=self._free.release)
