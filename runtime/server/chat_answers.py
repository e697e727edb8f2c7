"""What `/v1/chat/completions` answers: whole, or as the chunks of a stream."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from treadle.runtime.server.logprobs import TokenEntry, token_entries
from treadle.runtime.server.turn import (
    TextDelta,
    ToolCallArguments,
    ToolCallStarted,
    TurnEvent,
    TurnFinished,
    TurnUsage,
)
from treadle.runtime.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptDetails(TypedDict):
    """Of the prompt's tokens, those that were found in the cache."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Function(TypedDict):
    """Name and arguments of a call: JSON text, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: Function


class Message(TypedDict):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


class Logprobs(TypedDict):
    """Of the content's tokens."""

    content: list[TokenEntry]
    refusal: None


class Choice(TypedDict):
    """One answer."""

    index: int
    message: Message
    logprobs: Logprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """The whole answer to a request."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    service_tier: NotRequired[str]


class ChatAnswer:
    """Shapes a turn's events. `with_logprobs` and `with_usage` say what the client asked for."""

    def __init__(
        self, tokenizer: Tokenizer, head: dict[str, Any], *, n: int, with_logprobs: bool, with_usage: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", **head}
        self._with_logprobs = with_logprobs
        self.with_usage = with_usage
        self._messages: list[Message] = [{"role": "assistant", "content": None, "refusal": None} for _ in range(n)]
        self._entries: list[list[TokenEntry]] = [[] for _ in range(n)]
        self._reasons: list[FinishReason] = ["stop"] * n

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with: whose message each answer is."""
        for index in range(len(self._messages)):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def chunk(self, event: TurnEvent) -> dict[str, Any]:
        """What a stream says of an event."""
        match event:
            case TextDelta(index, text, _):
                return self._chunk(index, {"content": text}, logprobs=self._logprobs(self._entries_of(event)))
            case ToolCallStarted(index, call, call_id, name):
                function = {"name": name, "arguments": ""}
                begun = {"index": call, "id": call_id, "type": "function", "function": function}
                return self._chunk(index, {"tool_calls": [begun]})
            case ToolCallArguments(index, call, text):
                return self._chunk(index, {"tool_calls": [{"index": call, "function": {"arguments": text}}]})
            case TurnFinished(index, reason, _):
                return self._chunk(index, {}, reason)

    def usage_chunk(self, usage: TurnUsage) -> dict[str, Any]:
        """What a stream ends with, if the client wants it."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage_of(usage)}

    def take(self, event: TurnEvent) -> None:
        """Adds an event to the whole."""
        message = self._messages[event.index]
        match event:
            case TextDelta(index, text, _):
                message["content"] = (message["content"] or "") + text
                self._entries[index] += self._entries_of(event)
            case ToolCallStarted(_, _, call_id, name):
                function: Function = {"name": name, "arguments": ""}
                message.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
            case ToolCallArguments(_, call, text):
                message["tool_calls"][call]["function"]["arguments"] += text
            case TurnFinished(index, reason, _):
                self._reasons[index] = reason
                if message["content"] is None and "tool_calls" not in message:
                    message["content"] = ""

    def whole(self, usage: TurnUsage) -> dict[str, Any]:
        """The completion, when every answer has ended."""
        choices = [
            {
                "index": index,
                "message": message,
                "logprobs": self._logprobs(self._entries[index]),
                "finish_reason": self._reasons[index],
            }
            for index, message in enumerate(self._messages)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage_of(usage)}

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: FinishReason | None = None, logprobs: Logprobs | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**chunk, "usage": None} if self.with_usage else chunk

    def _entries_of(self, event: TextDelta) -> list[TokenEntry]:
        return token_entries(self._tokenizer, event.logprobs) if self._with_logprobs else []

    def _logprobs(self, entries: list[TokenEntry]) -> Logprobs | None:
        return {"content": entries, "refusal": None} if self._with_logprobs else None


def usage_of(usage: TurnUsage) -> Usage:
    """Tokens as OpenAI counts them."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }
