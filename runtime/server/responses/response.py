"""The response object: what was asked for, what has come of it, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

from treadle.runtime.server.responses.items import Change, LogprobsWriter, Output, new_id
from treadle.runtime.server.turn import TurnEvent, TurnFinished

ResponseStatus: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed"]


class Response:
    """One response while it is made.

    `asked` are the fields of the request that the object repeats; `logprobs` writes logprobs as clients read them.
    """

    def __init__(self, asked: Mapping[str, Any], logprobs: LogprobsWriter) -> None:
        self.id = new_id("resp")
        self.status: ResponseStatus = "in_progress"
        self.output = Output(logprobs)
        self._asked = dict(asked)
        self._created = time.time()
        self._completed: float | None = None
        self._usage: dict[str, Any] | None = None
        self._error: dict[str, str] | None = None

    def take(self, event: TurnEvent) -> Iterator[Change]:
        """Adds an event of the turn. The changes must be used as they come: they show the items as they are then."""
        yield from self.output.take(event)
        if isinstance(event, TurnFinished):
            self._usage = usage_json(event)
            self.status = "incomplete" if event.reason == "length" else "completed"
            self._completed = time.time() if self.status == "completed" else None

    def fail(self, code: str, message: str) -> Iterator[Change]:
        """Ends the response with an error. What was written stays, as incomplete."""
        yield from self.output.close("incomplete")
        self.status = "failed"
        self._error = {"code": code, "message": message}

    def to_json(self) -> dict[str, Any]:
        """The object as clients see it at this moment."""
        return {
            "id": self.id,
            "object": "response",
            "created_at": int(self._created),
            "completed_at": None if self._completed is None else int(self._completed),
            "status": self.status,
            "background": False,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            **self._asked,
            "output": self.output.to_json(),
            "usage": self._usage,
        }


def usage_json(finished: TurnFinished) -> dict[str, Any]:
    """Where the tokens went, in the words of the Responses API."""
    usage = finished.usage
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }
