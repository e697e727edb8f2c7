"""The output items of a response, as a turn's events write them.

    events   TextDelta.. | ToolCallStarted, ToolCallArguments.. | ToolCallStarted, .. | TurnFinished
    items    message     | function_call                        | function_call       |

Stream and final object are read off the same items, so an id or a `call_id` cannot differ between them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from treadle.runtime.server.logprobs import TokenEntry
from treadle.runtime.server.turn import TextDelta, ToolCallArguments, ToolCallStarted, TurnEvent, TurnFinished
from treadle.scheduler import TokenLogprob

LogprobsWriter: TypeAlias = Callable[[Sequence[TokenLogprob]], Sequence[TokenEntry]]
Status: TypeAlias = Literal["in_progress", "completed", "incomplete"]


def new_id(prefix: str) -> str:
    """An id that nobody can guess, such as `msg_...`."""
    return f"{prefix}_{secrets.token_hex(16)}"


@dataclass(slots=True)
class MessageItem:
    """Text that the model writes: a message of one part."""

    id: str = field(default_factory=lambda: new_id("msg"))
    status: Status = "in_progress"
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenEntry] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def part(self) -> dict[str, Any]:
        """The one part of the message's content."""
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self.logprobs)}

    def to_json(self) -> dict[str, Any]:
        content = [] if self.status == "in_progress" else [self.part()]
        return {"id": self.id, "type": "message", "role": "assistant", "status": self.status, "content": content}


@dataclass(slots=True)
class CallItem:
    """A call of a function. The client answers with its `call_id`; `id` is the item's own."""

    call_id: str
    name: str
    id: str = field(default_factory=lambda: new_id("fc"))
    status: Status = "in_progress"
    pieces: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "call_id": self.call_id,
            "name": self.name,
            "arguments": self.arguments,
            "status": self.status,
        }


Item: TypeAlias = MessageItem | CallItem


@dataclass(frozen=True, slots=True)
class Opened:
    """An item began; it stays at this index of the output."""

    index: int
    item: Item


@dataclass(frozen=True, slots=True)
class Grew:
    """An item's text, or its arguments, went on."""

    index: int
    item: Item
    text: str
    logprobs: Sequence[TokenEntry] = ()


@dataclass(frozen=True, slots=True)
class Closed:
    """An item is as it will stay."""

    index: int
    item: Item


Change: TypeAlias = Opened | Grew | Closed


class Output:
    """The items of one response. At most one is open: a turn is a single text, written from left to right.

    `logprobs` writes those of tokens as clients read them, if they are wanted.
    """

    def __init__(self, logprobs: LogprobsWriter | None = None) -> None:
        self.items: list[Item] = []
        self._logprobs = logprobs

    def take(self, event: TurnEvent) -> Iterator[Change]:
        """Adds an event to the items, and says what changed."""
        match event:
            case TextDelta():
                yield from self._write(event.text, self._logprobs(event.logprobs) if self._logprobs is not None else ())
            case ToolCallStarted():
                yield from self.close("completed")
                yield self._open(CallItem(event.id, event.name))
            case ToolCallArguments():
                item = self.items[-1]
                assert isinstance(item, CallItem), "arguments belong to the call that was started last"
                item.pieces.append(event.text)
                yield Grew(len(self.items) - 1, item, event.text)
            case TurnFinished():
                if not self.items:
                    yield self._open(MessageItem())  # clients look for what was said, even if that is nothing
                yield from self.close("incomplete" if event.reason == "length" else "completed")

    def close(self, status: Status) -> Iterator[Change]:
        """Closes the item that is open, if there is one."""
        if self.items and self.items[-1].status == "in_progress":
            self.items[-1].status = status
            yield Closed(len(self.items) - 1, self.items[-1])

    def to_json(self) -> list[dict[str, Any]]:
        return [item.to_json() for item in self.items]

    def _write(self, text: str, logprobs: Sequence[TokenEntry]) -> Iterator[Change]:
        item = self.items[-1] if self.items else None
        if not isinstance(item, MessageItem):
            yield from self.close("completed")
            item = MessageItem()
            yield self._open(item)
        item.pieces.append(text)
        item.logprobs.extend(logprobs)
        yield Grew(len(self.items) - 1, item, text, logprobs)

    def _open(self, item: Item) -> Opened:
        self.items.append(item)
        return Opened(len(self.items) - 1, item)
