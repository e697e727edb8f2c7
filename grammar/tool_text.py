"""Tool calls in a turn's text: finding them as the text comes in pieces, and writing them.

The form is the one that Hermes and Qwen models are trained on: `<tool_call>`, a line of JSON with `name` and
`arguments`, `</tool_call>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

OPEN = "<tool_call>"
CLOSE = "</tool_call>"

_STRING_OR_CLOSE = re.compile(r'"(?:[^"\\]|\\.)*+(?P<closed>")?|' + re.escape(CLOSE), re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One complete call. `index` counts the turn's calls from 0; `arguments` is JSON text as the model wrote it."""

    index: int
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class TurnDelta:
    """What a piece of text added to the turn: content outside calls, and calls that it completed."""

    content: str = ""
    calls: tuple[ToolCall, ...] = ()


class TurnStream:
    """Splits one turn's text into content and tool calls. The result does not depend on how the text is cut.

    A call is reported when its block closes. Content is held back only while it may be the beginning of a block. A
    block that is no call, which only an unconstrained model writes, is content, word for word. White space between a
    call and the next one, or the end, belongs to neither and is dropped.
    """

    def __init__(self) -> None:
        self._pending = ""
        self._searched = 0
        self._scanned = 0
        self._num_calls = 0
        self._after_call = False

    def push(self, text: str) -> TurnDelta:
        """Takes the next piece of text."""
        self._pending += text
        return self._take(last=False)

    def finish(self) -> TurnDelta:
        """What was held back, now that no text follows. The stream must not be used afterwards."""
        return self._take(last=True)

    def _take(self, *, last: bool) -> TurnDelta:
        content: list[str] = []
        calls: list[ToolCall] = []
        while (start := self._pending.find(OPEN)) >= 0:
            content.append(self._cut(start))
            end = self._block_end()
            if end < 0 and not last:
                break
            call = _parse_call(self._pending[len(OPEN) : max(0, end - len(CLOSE))], self._num_calls)
            self._searched = self._scanned = 0
            if call is None:
                # Only the tag is given up: a call may follow within what looked like its block.
                content.append(self._cut(len(OPEN)))
            else:
                calls.append(call)
                self._num_calls += 1
                self._pending = self._pending[end:]
                self._after_call = True
        else:
            kept = 0 if last else self._held_back()
            content.append(self._cut(len(self._pending) - kept))
        return TurnDelta("".join(content), tuple(calls))

    def _cut(self, length: int) -> str:
        text, self._pending = self._pending[:length], self._pending[length:]
        if self._after_call and not text.strip():
            return ""
        self._after_call = False
        return text

    def _held_back(self) -> int:
        """How many characters at the end may yet turn out to be no content."""
        text = self._pending
        tag = next((n for n in range(min(len(OPEN) - 1, len(text)), 0, -1) if text.endswith(OPEN[:n])), 0)
        return len(text) if self._after_call and not text[: len(text) - tag].strip() else tag

    def _block_end(self) -> int:
        """Where the block at the start of the pending text ends, or -1 while it may go on.

        A closing tag inside a JSON string is part of the arguments.
        """
        if self._pending.find(CLOSE, self._searched) < 0:
            self._searched = max(0, len(self._pending) - len(CLOSE) + 1)
            return -1
        while found := _STRING_OR_CLOSE.search(self._pending, self._scanned):
            if found[0] == CLOSE:
                return found.end()
            if found["closed"] is None:
                break
            self._scanned = found.end()
        self._searched = max(0, len(self._pending) - len(CLOSE) + 1)
        return -1


def render_tool_calls(calls: Iterable[ToolCall]) -> str:
    """The text of a turn's calls, from which `TurnStream` reads the same calls."""
    return "\n".join(f"{OPEN}{call_head(call.name)}{call.arguments}}}\n{CLOSE}" for call in calls)


def call_head(name: str) -> str:
    """What stands between the opening tag and the arguments."""
    return f'\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '


def _parse_call(body: str, index: int) -> ToolCall | None:
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str):
        return None
    if not isinstance(arguments := call.get("arguments", {}), dict):
        return None
    head = call_head(name)
    if body.startswith(head) and body.endswith("}\n") and list(call) == ["name", "arguments"]:
        return ToolCall(index, name, body[len(head) : -2])
    return ToolCall(index, name, json.dumps(arguments, ensure_ascii=False))
