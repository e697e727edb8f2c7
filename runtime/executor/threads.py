"""Synchronous tools in threads of their own: one that hangs holds up nobody, not even the end of the process."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Any

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
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Any] = loop.create_future()
        context = contextvars.copy_context()

        def work() -> None:
            try:
                result, error = context.run(function), None
            except BaseException as raised:
                result, error = None, raised
            try:
                loop.call_soon_threadsafe(self._deliver, outcome, result, error)
            except RuntimeError:
                return  # the loop was closed while the tool ran: nobody is waiting any more

        threading.Thread(target=work, name="treadle-tool", daemon=True).start()
        return await outcome

    def _deliver(self, outcome: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        self._free.release()
        if outcome.done():
            return
        if error is None:
            outcome.set_result(result)
        elif isinstance(error, Exception):
            outcome.set_exception(error)
        else:
            outcome.set_exception(RuntimeError(f"the tool ended its thread with {type(error).__name__}"))
