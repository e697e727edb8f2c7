"""A conversation as token ids. What the model itself wrote goes back as the very tokens that it generated."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

from treadle.grammar import ToolCall, ToolSpec, render_tool_calls
from treadle.runtime.executor.prompts import PromptEncoder, Recorded, Turn
from treadle.runtime.text.tokenizer import Tokenizer

RecordedIds: TypeAlias = Callable[[Mapping[str, Any]], "tuple[int, ...] | None"]
MAX_INLINE_CHARACTERS = 20_000
"""Longer prompts are made into tokens beside the event loop, which must not stand still for so long."""
_beside = ThreadPoolExecutor(2, thread_name_prefix="treadle-encode")  # more would only keep the event loop waiting


async def encode_beside(encode: Callable[[], tuple[int, ...]], num_characters: int) -> tuple[int, ...]:
    """What `encode` makes of so many characters: at once if they are few, else in another thread."""
    if num_characters <= MAX_INLINE_CHARACTERS:
        return encode()
    return await asyncio.get_running_loop().run_in_executor(_beside, encode)


@dataclass(frozen=True, slots=True)
class Function:
    """A tool as templates show it to the model."""

    name: str
    description: str
    parameters: dict[str, Any]


class ChatEncoder:
    """Encodes conversations for one model. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._prompts = PromptEncoder(tokenizer)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """The ids of plain text, after the token that the model was trained to begin with. Text is never special."""
        bos = self._tokenizer.bos_token_id
        begin = (bos,) if self._tokenizer.add_bos and bos is not None else ()
        return (*begin, *self._tokenizer.encode(text))

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[ToolSpec] = (),
        recorded: RecordedIds = lambda message: None,
    ) -> tuple[int, ...]:
        """The ids of a prompt that ends where the model begins to write.

        `recorded` gives what the model generated where it wrote an assistant's message, or nothing. Raises
        `InvalidRequestError` for messages that the model's template refuses.
        """
        functions = [Function(tool.name, tool.description, json.loads(tool.parameters)) for tool in tools]
        turns = self._prompts.fitted([_turn(message, recorded) for message in messages], functions)
        parts = self._prompts.encode(turns, functions)
        return tuple(token_id for part in parts if isinstance(part, tuple) for token_id in part)


def _turn(message: Mapping[str, Any], recorded: RecordedIds) -> Turn:
    role, name = message["role"], message.get("name")
    if role == "assistant":
        return Turn(role, list(_written(message, recorded)), name)
    return Turn("system" if role == "developer" else role, [message.get("content") or ""], name)


def _written(message: Mapping[str, Any], recorded: RecordedIds) -> Iterator[str | Recorded]:
    """What an assistant's message was, as the model wrote it or would have."""
    token_ids = recorded(message)
    if token_ids:
        yield Recorded(token_ids)
        return
    content, calls = message.get("content") or "", message.get("tool_calls") or ()
    yield content
    if calls:
        functions = [call["function"] for call in calls]
        text = render_tool_calls(ToolCall(i, each["name"], each["arguments"]) for i, each in enumerate(functions))
        yield ("\n" if content else "") + text
