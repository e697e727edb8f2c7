"""Conversations told apart by what was said: digests of messages, and the ids that a model generated for them.

    messages    system | user | assistant | tool | user
    digests     d1     | d2   | d3        | d4   | d5      each of a message and of all before it

A request that begins with messages whose digest is known continues that conversation. Two clients write the same
message differently, so what is hashed is what it says: text, role, calls with their arguments as JSON values.
"""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]
Digest: TypeAlias = bytes

EMPTY: Digest = b""
MAX_RECORDED_IDS = 4 * 2**20
"""Ids of all programs together; those recorded first go first. They take 4 bytes each."""


def extended(before: Digest, message: Message) -> Digest:
    """The digest of a conversation with one message more."""
    return blake2b(before + digest_of(message), digest_size=16).digest()


def digests(messages: Sequence[Message]) -> Iterator[Digest]:
    """The digest after each message."""
    so_far = EMPTY
    for message in messages:
        so_far = extended(so_far, message)
        yield so_far


def digest_of(message: Message) -> Digest:
    """The digest of what one message says."""
    said = [message.get("role"), _text(message.get("content")), message.get("tool_call_id")]
    said += [_call(call) for call in message.get("tool_calls") or ()]
    written = json.dumps(said, ensure_ascii=True, sort_keys=True, default=repr)
    return blake2b(written.encode(), digest_size=16).digest()


def _text(content: Any) -> Any:
    """Content as text if it is nothing else: null, "" and an empty list say the same, and so do text parts and text."""
    if not content:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else [content]
    texts = [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return "".join(texts) if len(texts) == len(parts) else parts


def _call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    function = call.get("function")
    if not isinstance(function, Mapping):
        return dict(call)
    return [call.get("id"), function.get("name"), _arguments(function.get("arguments"))]


def _arguments(text: Any) -> Any:
    """Arguments without what JSON leaves free: blanks, and the order of keys."""
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return text


class RecordedIds:
    """What models wrote, as the ids that they generated, by program and message.

    A prompt that holds them in place of the text extends the last one exactly, so its KV is found again. Any thread may
    call `get`.
    """

    def __init__(self, most: int = MAX_RECORDED_IDS) -> None:
        self._most = most
        self._count = 0
        self._ids: OrderedDict[tuple[str, Digest], array[int]] = OrderedDict()
        self._programs: dict[str, set[Digest]] = {}

    def __len__(self) -> int:
        return self._count

    def put(self, program_id: str, message: Message, token_ids: Sequence[int]) -> None:
        """Records a message of a program. One without ids is only forgotten: nothing would bound how many there are."""
        digest = digest_of(message)
        self._remove(program_id, digest)
        if not token_ids:
            return
        self._ids[program_id, digest] = array("i", token_ids)
        self._programs.setdefault(program_id, set()).add(digest)
        self._count += len(token_ids)
        while self._count > self._most:
            self._remove(*next(iter(self._ids)))

    def get(self, program_id: str, message: Message) -> tuple[int, ...] | None:
        """The ids of a message, if the program's model wrote it and they are still known."""
        found = self._ids.get((program_id, digest_of(message)))
        return tuple(found) if found is not None else None

    def forget(self, program_id: str) -> None:
        """The program has ended."""
        for digest in self._programs.pop(program_id, set()).copy():
            self._count -= len(self._ids.pop((program_id, digest)))

    def _remove(self, program_id: str, digest: Digest) -> None:
        found = self._ids.pop((program_id, digest), None)
        if found is not None:
            self._count -= len(found)
            known = self._programs[program_id]
            known.discard(digest)
            if not known:
                del self._programs[program_id]
