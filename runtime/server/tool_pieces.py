"""The text of a turn with tools, taken apart while it is written: content, tool calls, and their arguments in pieces.

    content | <tool_call>\\n{"name": "add", "arguments": | {"a": 1} | }\\n</tool_call> | \\n<tool_call>...
     given               begins a call                     given      dropped

The grammar of such a turn lets nothing else be written, so a call can be told when its name is there, and arguments
end where their first brace is closed. A call that is cut off has the arguments that were written.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from treadle.grammar.tool_text import CLOSE, OPEN

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_MARKS = re.compile(r'[{}"\\]')


@dataclass(frozen=True, slots=True)
class ContentPiece:
    """Text outside of calls."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call, the turn's `call`th from 0."""

    call: int
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentPiece:
    """More of a call's arguments."""

    call: int
    text: str


Piece: TypeAlias = ContentPiece | CallBegun | ArgumentPiece


class _Within(enum.Enum):
    CONTENT = enum.auto()
    HEAD = enum.auto()
    ARGUMENTS = enum.auto()
    CLOSING = enum.auto()


class ToolPieces:
    """Takes a turn's text as it comes. What comes out, joined, does not depend on how the text is cut.

    White space between a call and the next one, or the end, belongs to neither.
    """

    def __init__(self) -> None:
        self._within = _Within.CONTENT
        self._pending = ""
        self._call = -1
        self._arguments = _ObjectEnd()

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._call + 1

    @property
    def in_call(self) -> bool:
        """Whether a call is being written, as far as that is certain."""
        return self._within is not _Within.CONTENT

    def push(self, text: str) -> list[Piece]:
        """What the next piece of text brings."""
        self._pending += text
        return list(self._take())

    def finish(self) -> list[Piece]:
        """What was held back, now that nothing follows."""
        text, self._pending = self._pending, ""
        if self._within is not _Within.CONTENT or (self.num_calls and not text.strip()):
            return []
        return [ContentPiece(text)] if text else []

    def _take(self) -> Iterator[Piece]:
        progress = True
        while progress:
            match self._within:
                case _Within.CONTENT:
                    start = self._pending.find(OPEN)
                    progress = start >= 0
                    text = self._cut(start if progress else len(self._pending) - self._held_back())
                    if text and not (self.num_calls and not text.strip()):
                        yield ContentPiece(text)
                    if progress:
                        self._cut(len(OPEN))
                        self._within = _Within.HEAD
                case _Within.HEAD:
                    head = _HEAD.match(self._pending)
                    progress = head is not None
                    if head is not None:
                        self._cut(head.end())
                        self._call += 1
                        self._arguments = _ObjectEnd()
                        self._within = _Within.ARGUMENTS
                        yield CallBegun(self._call, json.loads(head[1]))
                case _Within.ARGUMENTS:
                    end = self._arguments.find(self._pending)
                    progress = end is not None
                    text = self._cut(len(self._pending) if end is None else end)
                    if progress:
                        self._within = _Within.CLOSING
                    if text:
                        yield ArgumentPiece(self._call, text)
                case _Within.CLOSING:
                    end = self._pending.find(CLOSE)
                    progress = end >= 0
                    if progress:
                        self._cut(end + len(CLOSE))
                        self._within = _Within.CONTENT

    def _cut(self, length: int) -> str:
        text, self._pending = self._pending[:length], self._pending[length:]
        return text

    def _held_back(self) -> int:
        """How many characters at the end may yet be no content: the beginning of a tag, and the space before it."""
        text = self._pending
        tag = next((n for n in range(min(len(OPEN) - 1, len(text)), 0, -1) if text.endswith(OPEN[:n])), 0)
        return len(text) if self.num_calls and not text[: len(text) - tag].strip() else tag


class _ObjectEnd:
    """Finds where a JSON object ends whose text comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """The position behind the closing brace, or None if it is not in this piece."""
        start = 1 if self._escaped and text else 0
        self._escaped = self._escaped and not text
        position = start
        while found := _MARKS.search(text, position):
            position = found.end()
            match found[0], self._in_string:
                case "\\", True:
                    if position == len(text):
                        self._escaped = True
                    position += 1
                case '"', _:
                    self._in_string = not self._in_string
                case "{", False:
                    self._depth += 1
                case "}", False:
                    self._depth -= 1
                    if self._depth == 0:
                        return position
        return None
