"""Items of a conversation as the chat messages that a model's template knows.

items       message (assistant), function_call, function_call | function_call_output | function_call_output
messages    assistant: content, two tool_calls                | tool                 | tool
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from treadle.runtime.server.errors import ApiError


def messages_of(items: Iterable[Mapping[str, Any]], instructions: str | None = None) -> list[dict[str, Any]]:
    """The messages. Items of one turn of the model become one message.

    Raises `ApiError` for an output of a call that nobody made.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    called: set[str] = set()
    turn: dict[str, Any] | None = None
    for item in items:
        kind = item["type"]
        if kind == "function_call":
            if turn is None:
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            called.add(item["call_id"])
            turn.setdefault("tool_calls", []).append(_tool_call(item))
        elif kind == "message" and item["role"] == "assistant":
            if turn is not None and "tool_calls" in turn:
                turn["content"] += _text(item["content"])  # said after a call, in the same breath
            else:
                turn = {"role": "assistant", "content": _text(item["content"])}
                messages.append(turn)
        elif kind == "message":
            turn = None
            messages.append({"role": item["role"], "content": _text(item["content"])})
        elif kind == "function_call_output":
            turn = None
            if item["call_id"] not in called:
                text = f"no function_call before it has the call_id {item['call_id']!r} of this function_call_output"
                raise ApiError(400, text, param="input")
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])})
    return messages


def _tool_call(item: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["refusal"] if part["type"] == "refusal" else part["text"] for part in content)
