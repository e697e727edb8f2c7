"""Looks at the engine from time to time, for metrics and for quotas of memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping

from treadle.runtime.engine.session import Session
from treadle.runtime.errors import EngineClosedError
from treadle.runtime.server.admission import Admission
from treadle.runtime.server.metrics import Metrics

INTERVAL_S = 1.0
NO_PROGRAM = " "
"""No program is called so: the report is then of pages, calls and tenants alone."""


async def monitor(
    session: Session,
    metrics: Metrics,
    admission: Admission,
    page_bytes: int,
    num_restarts: Callable[[], int] = lambda: 0,
    interval_s: float = INTERVAL_S,
) -> None:
    """Until the engine is gone for good. `num_restarts` tells how often it was started anew. For a task of the server.

    A report that does not come, because the engine was just replaced, is asked for again.
    """
    counting = asyncio.create_task(_count_decisions(session, metrics), name="treadle-decisions")
    seen_restarts = 0
    try:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(10 * interval_s):
                    report = await session.inspect(NO_PROGRAM)
                metrics.inspected(report)
                admission.observe_kv({name: page_bytes * _pages(held) for name, held in report["tenants"].items()})
            while seen_restarts < num_restarts():
                seen_restarts += 1
                metrics.engine_restarted()
            await asyncio.sleep(interval_s)
    except EngineClosedError:
        return
    finally:
        counting.cancel()


def _pages(held: Mapping[str, int]) -> int:
    """Pages that a tenant's programs use, or will come back to."""
    return held["running_pages"] + held["leased_pages"]


async def _count_decisions(session: Session, metrics: Metrics) -> None:
    async for decision in session.decisions():
        if decision.action == "preempt":
            metrics.preempted()
