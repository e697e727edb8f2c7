"""Lengths of time as people write them."""

from __future__ import annotations

import re
from typing import TypeAlias

from treadle.dsl.errors import DSLError
from treadle.dsl.location import caller

Duration: TypeAlias = float | str
"""Seconds, or text such as `"500ms"`, `"2s"`, `"1.5m"`, `"1h"`."""

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_FORM = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(ms|s|min|m|h)\s*")


class DurationError(DSLError, ValueError):
    """A length of time that is not one."""


def seconds(duration: Duration) -> float:
    """A length of time in seconds. Raises `DurationError` for what is negative or not a length of time."""
    if isinstance(duration, str):
        match = _FORM.fullmatch(duration)
        if match is not None:
            return float(match[1]) * _UNITS[match[2]]
    elif 0 <= duration < float("inf"):
        return float(duration)
    raise DurationError(
        f'{caller()}: {duration!r} is not a length of time; give seconds, or text such as "2s" or "500ms"'
    )
