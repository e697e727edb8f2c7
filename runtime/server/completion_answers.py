"""What `/v1/completions` answers: whole, or as the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from treadle.runtime.server.chat_answers import Usage, usage_of
from treadle.runtime.server.logprobs import token_entries
from treadle.runtime.server.turn import TextDelta, TurnEvent, TurnFinished, TurnUsage
from treadle.runtime.text.tokenizer import Tokenizer
from treadle.scheduler import TokenLogprob


class CompletionLogprobs(TypedDict):
    """Of each token: its text, its logprob, the best ones in its place, and where its text begins."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """How a prompt may go on. Choices of the first prompt come first. `token_ids` is there where there is no text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    token_ids: NotRequired[list[int]]


class Completion(TypedDict):
    """The whole answer to a request."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionAnswer:
    """Shapes the events of a request's turns. `echoes` has what each answer begins with: its prompt, or nothing.

    Events come with the place of their turn's first answer among all.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, model: str, echoes: Sequence[str], *, with_logprobs: bool, with_usage: bool
    ) -> None:
        self.with_usage = with_usage
        self._tokenizer = tokenizer
        self._head: dict[str, Any] = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._with_logprobs = with_logprobs
        self._echoes = echoes
        self._lengths = [0] * len(echoes)
        self._choices = [self._choice(index, echo) for index, echo in enumerate(echoes)]

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with: the prompts, if they are to be repeated."""
        for index, echo in enumerate(self._echoes):
            if echo:
                yield self._chunk(self._choice(index, echo))

    def chunk(self, first: int, event: TurnEvent) -> dict[str, Any]:
        """What a stream says of an event."""
        return self._chunk(self._choice_of(first, event))

    def usage_chunk(self, usages: Sequence[TurnUsage]) -> dict[str, Any]:
        """What a stream ends with, if the client wants it."""
        return {**self._head, "choices": [], "usage": usage_of(_sum(usages))}

    def take(self, first: int, event: TurnEvent) -> None:
        """Adds an event to the whole."""
        more = self._choice_of(first, event)
        choice = self._choices[more["index"]]
        choice["text"] += more["text"]
        choice["finish_reason"] = more["finish_reason"]
        if "token_ids" in more:
            choice.setdefault("token_ids", []).extend(more["token_ids"])
        if choice["logprobs"] is not None and more["logprobs"] is not None:
            for name, values in choice["logprobs"].items():
                values += more["logprobs"][name]  # type: ignore[literal-required]

    def whole(self, usages: Sequence[TurnUsage]) -> dict[str, Any]:
        """The completion, when every answer has ended."""
        return {**self._head, "choices": self._choices, "usage": usage_of(_sum(usages))}

    def _chunk(self, choice: CompletionChoice) -> dict[str, Any]:
        chunk = {**self._head, "choices": [choice]}
        return {**chunk, "usage": None} if self.with_usage else chunk

    def _choice_of(self, first: int, event: TurnEvent) -> CompletionChoice:
        index = first + event.index
        match event:
            case TextDelta(_, text, logprobs, token_ids):
                choice = self._choice(index, text, logprobs)
                if token_ids:
                    choice["token_ids"] = list(token_ids)
                return choice
            case TurnFinished(_, reason, _):
                choice = self._choice(index, "")
                choice["finish_reason"] = "length" if reason == "length" else "stop"
                return choice
        raise AssertionError("there are no tools here")

    def _choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> CompletionChoice:
        entries = self._logprobs(index, logprobs) if self._with_logprobs else None
        return {"index": index, "text": text, "logprobs": entries, "finish_reason": None}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> CompletionLogprobs:
        found: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in token_entries(self._tokenizer, logprobs):
            found["tokens"].append(entry["token"])
            found["token_logprobs"].append(entry["logprob"])
            found["top_logprobs"].append({each["token"]: each["logprob"] for each in entry["top_logprobs"]})
            found["text_offset"].append(self._lengths[index])
            self._lengths[index] += len(entry["token"])
        return found


def _sum(usages: Sequence[TurnUsage]) -> TurnUsage:
    return TurnUsage(
        sum(usage.prompt for usage in usages),
        sum(usage.cached for usage in usages),
        sum(usage.completion for usage in usages),
    )
