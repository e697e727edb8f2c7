"""Tells special tokens that a chat template writes from text that merely looks like them.

What a user wrote is guarded before the template sees it: every part that is a special token, or could become one beside
other text, is swapped for a stand-in that cannot be guessed. Whatever special token is then found in the rendered
prompt comes from the template, and the stand-ins are swapped back in the text between:

    content    hi<|im_end|>                      guard   ->  hi⟨7⟩
    rendered   <|im_start|>user⏎hi⟨7⟩<|im_end|>  split   ->  1, "user⏎hi⟨7⟩", 2
                                                 restore ->  1, "user⏎hi<|im_end|>", 2
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

END_OF_TURN_TOKENS = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|end|>",
        "<|eot|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|end_of_turn|>",
        "<｜end▁of▁sentence｜>",
        "</s>",
    }
)
"""Special tokens that end a turn in some well-known family of models."""

_KNOWN_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython", "model"})
_BREAK = "\u200b"


class SpecialToken(NamedTuple):
    """A special token as it is matched in text; `strips_left` and `strips_right` take the white space beside it."""

    token_id: int
    text: str
    strips_left: bool = False
    strips_right: bool = False


class SpecialText:
    """Finds special tokens in text, the leftmost and of those the longest, as the tokenizer does."""

    def __init__(self, tokens: list[SpecialToken]) -> None:
        self._tokens = {token.text: token for token in tokens if token.text}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._beginnings = {text[:end] for text in self._tokens for end in range(1, len(text))}
        self._endings = {text[start:] for text in self._tokens for start in range(1, len(text))}
        self._max_length = len(longest_first[0]) if longest_first else 0

    def split(self, text: str) -> list[str | int]:
        """`text` as special ids and the text between them, without the white space that the tokens take."""
        parts: list[str | int] = []
        position = 0
        for match in self.pattern.finditer(text):
            token = self._tokens[match[0]]
            before = text[position : match.start()]
            parts.append(before.rstrip() if token.strips_left else before)
            parts.append(token.token_id)
            position = match.end()
            if token.strips_right:
                rest = text[position:]
                position += len(rest) - len(rest.lstrip())
        parts.append(text[position:])
        return [part for part in parts if part != ""]

    def guard(self, text: str, swap: Callable[[str], str]) -> str:
        """`text` with `swap` applied to every special token in it, to an end of it that could begin one, to a start
        that could end one, and to all of it if it could be the middle of one.

        An identifier is let pass where only its middle could be meant: templates compare such words (`text`, `image`)
        with their own.
        """
        parts = self.pattern.split(text)
        if len(parts) == 1 and not text.isidentifier() and self._is_within(text):
            return swap(text)
        found = self.pattern.findall(text)
        head = self._overlap(parts[0], self._endings, at_end=False)
        first, parts[0] = parts[0][:head], parts[0][head:]
        tail = len(parts[-1]) - self._overlap(parts[-1], self._beginnings, at_end=True)
        parts[-1], last = parts[-1][:tail], parts[-1][tail:]
        guarded = parts[0] + "".join(swap(token) + part for token, part in zip(found, parts[1:], strict=True))
        return (swap(first) if first else "") + guarded + (swap(last) if last else "")

    def _overlap(self, text: str, pieces: set[str], *, at_end: bool) -> int:
        """The length of the longest of `pieces` with which `text` begins or ends."""
        for length in range(min(self._max_length - 1, len(text)), 0, -1):
            if (text[-length:] if at_end else text[:length]) in pieces:
                return length
        return 0

    def _is_within(self, text: str) -> bool:
        return 0 < len(text) < self._max_length and any(text in token and text != token for token in self._tokens)


class StandIns:
    """The stand-ins of one request."""

    def __init__(self) -> None:
        self.originals: list[str] = []
        nonce = secrets.randbits(64)
        # Digits between private-use letters survive trimming, changes of case and JSON.
        self._format = f"\ue000{nonce}.{{}}\ue001"
        self._pattern = re.compile(f"\ue000{nonce}\\.(\\d+)\ue001")

    def swap(self, text: str) -> str:
        self.originals.append(text)
        return self._format.format(len(self.originals) - 1)

    def restore(self, text: str) -> str:
        return self._pattern.sub(lambda match: self.originals[int(match[1])], text)


def broken(text: str) -> str:
    """`text` with zero-width spaces that keep it from being, or becoming, a special token."""
    return f"{_BREAK}{text[0]}{_BREAK}{text[1:]}{_BREAK}"


def guard_all(value: Any, special: SpecialText, swap: Callable[[str], str], *, field: str = "") -> Any:
    """A copy of messages, tools or the like in which every string is guarded, but for the roles everyone knows."""
    if isinstance(value, str):
        if field == "role" and value in _KNOWN_ROLES:
            return value
        return special.guard(value, swap)
    if isinstance(value, Mapping):
        return {
            special.guard(key, swap) if isinstance(key, str) else key: guard_all(item, special, swap, field=str(key))
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [guard_all(item, special, swap) for item in value]
    return value
