"""Spans of programs, turns and tools for OpenTelemetry. Off, and nothing of it imported, unless an endpoint is set.

A span is written when what it is about has ended, so nothing is kept for it meanwhile. What was said is never exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from treadle.runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from treadle.runtime.server.spans import Spans


@dataclass(frozen=True, slots=True)
class Period:
    """When something was, in nanoseconds since 1970."""

    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class TurnFacts:
    """What is told of a turn. `error` is the status or the kind of its failure; the rest may then be missing."""

    program_id: str
    headers: Mapping[str, str]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finish_reasons: Sequence[str] = ()
    first_token_s: float | None = None
    error: str = ""


class Tracing:
    """Writes spans to a collector, if `endpoint` is set: in batches, and beside the requests.

    Raises `InvalidRequestError` if it is set and the `otel` extra is not installed.
    """

    def __init__(self, endpoint: str | None, model: str) -> None:
        self._spans: Spans | None = None
        if endpoint is None:
            return
        try:
            from treadle.runtime.server.spans import Spans, exporter_to
        except ImportError as error:
            text = f"spans need OpenTelemetry, which is not installed ({error.name}): pip install 'treadle[otel]'"
            raise InvalidRequestError(text) from None
        self._spans = Spans(exporter_to(endpoint), model)

    def close(self) -> None:
        """Writes what is left. Takes seconds if the collector does not answer."""
        if self._spans is not None:
            self._spans.close()

    def turn_ended(self, facts: TurnFacts, period: Period) -> None:
        """Writes a turn."""
        if self._spans is not None:
            self._spans.turn_ended(facts, period)

    def tool_ended(self, program_id: str, name: str, call_id: str, period: Period) -> None:
        """Writes a tool run that the server saw from outside."""
        if self._spans is not None:
            self._spans.tool_ended(program_id, name, call_id, period)

    def program_ended(self, program_id: str, kind: str, period: Period) -> None:
        """Writes a program."""
        if self._spans is not None:
            self._spans.program_ended(program_id, kind, period)
