"""The response object: what was asked for, what has come of it, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Required, TypeAlias

from typing_extensions import TypedDict

from treadle.runtime.server.errors import ApiError
from treadle.runtime.server.responses.items import Change, LogprobsWriter, Output, new_id
from treadle.runtime.server.turn import TurnEvent, TurnFinished, TurnUsage

ResponseStatus: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed"]


class ResponseError(TypedDict):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(TypedDict):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class InputTokensDetails(TypedDict):
    """Of the input's tokens, those that were found in the cache."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    """Of the output's tokens, those of reasoning: none."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseObject(TypedDict, total=False):
    """A response as clients see it. Beside these fields it repeats those of the request."""

    id: Required[str]
    object: Required[Literal["response"]]
    created_at: Required[int]
    completed_at: Required[int | None]
    status: Required[ResponseStatus]
    background: Required[Literal[False]]
    error: Required[ResponseError | None]
    incomplete_details: Required[IncompleteDetails | None]
    output: Required[list[dict[str, Any]]]
    usage: Required[ResponseUsage | None]
    model: Required[str]


class DeletedResponse(TypedDict):
    """A response that is stored no longer."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class Response:
    """One response while it is made.

    `asked` are the fields of the request that the object repeats; `logprobs` writes those of tokens as
    clients read them, if they are wanted.
    """

    def __init__(self, asked: Mapping[str, Any], logprobs: LogprobsWriter | None = None) -> None:
        self.id = new_id("resp")
        self.status: ResponseStatus = "in_progress"
        self.output = Output(logprobs)
        self._asked = dict(asked)
        self._created = time.time()
        self._completed: float | None = None
        self._usage: ResponseUsage | None = None
        self._error: ResponseError | None = None

    def take(self, event: TurnEvent) -> Iterator[Change]:
        """Adds an event of the turn. The changes must be used as they come: they show the items as they are then."""
        yield from self.output.take(event)
        if isinstance(event, TurnFinished):
            self._usage = usage_of(event.usage)
            self.status = "incomplete" if event.reason == "length" else "completed"
            self._completed = time.time() if self.status == "completed" else None

    def fail(self, error: ApiError) -> Iterator[Change]:
        """Ends the response with an error. What was written stays, as incomplete."""
        yield from self.output.close("incomplete")
        self.status = "failed"
        code = "rate_limit_exceeded" if error.type == "rate_limit_error" else error.code or "server_error"
        self._error = {"code": code, "message": error.message}

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


def usage_of(usage: TurnUsage) -> ResponseUsage:
    """Where the tokens went, in the words of the Responses API."""
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }
