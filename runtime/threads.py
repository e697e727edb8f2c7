"""Blocking work in a thread that nobody has to wait for: not the event loop, and not the end of the process."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def run_in_daemon(
    function: Callable[[], T],
    name: str,
    *,
    ended: Callable[[], object] = lambda: None,
    unwanted: Callable[[T], object] = lambda result: None,
) -> T:
    """The result of a function that runs in a daemon thread; raises what it raises.

    A thread cannot be ended from outside. If the caller is cancelled it goes on, and if its result still comes,
    `unwanted` is called with it. `asyncio.to_thread` would keep the loop from closing until then.

    Args:
        name: Of the thread.
        ended: Called on the loop's thread when the function has ended, if the loop is still there.
        unwanted: Called with a result that nobody waits for any more, on the loop's thread or the function's.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()

    def deliver(result: Any, error: BaseException | None) -> None:
        thread.join()  # it has nothing left to do
        ended()
        if outcome.done():
            if error is None:
                unwanted(result)
        elif error is None:
            outcome.set_result(result)
        elif isinstance(error, Exception):
            outcome.set_exception(error)
        else:
            outcome.set_exception(RuntimeError(f"{name}: the thread was ended with {type(error).__name__}"))

    def work() -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            result = context.run(function)
        except BaseException as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(deliver, result, error)
        except RuntimeError:  # the loop was closed meanwhile: nobody is waiting any more
            if error is None:
                unwanted(result)

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return await outcome
