"""Who is told what happens to programs: figures and spans."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from treadle.runtime.server.metrics import Metrics
from treadle.runtime.server.tracing import Period, Tracing


class ProgramFigures:
    """A watcher of programs that measures and traces tools and programs when they have ended."""

    def __init__(self, metrics: Metrics, tracing: Tracing) -> None:
        self._metrics = metrics
        self._tracing = tracing

    def __call__(self, tenant: str, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "tool.ended":
            self._metrics.tool_ended(data["seconds"])
            trace_id = traced_id(tenant, data["program"])
            self._tracing.tool_ended(trace_id, data["tool"], data["call_id"], last(data["seconds"]))
        elif kind == "program.ended" and data["account"] is not None:
            seconds = data["account"]["duration_s"]
            self._metrics.program_ended(seconds)
            self._tracing.program_ended(traced_id(tenant, data["program"]), data.get("kind", ""), last(seconds))


def traced_id(tenant: str, public_id: str) -> str:
    """A program by a name that no other tenant's program has."""
    return f"{tenant}/{public_id}" if tenant else public_id


def last(seconds: float) -> Period:
    """The time up to now."""
    now = time.time_ns()
    return Period(now - round(seconds * 1e9), now)
