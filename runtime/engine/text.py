"""The text of a call, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from treadle.runtime.text.detokenizer import Detokenizer, StopStrings

if TYPE_CHECKING:
    from treadle.runtime.text.tokenizer import Tokenizer


class TextStream:
    """Turns the tokens of one call into text that never has to be taken back. Without a tokenizer there is no text."""

    __slots__ = ("_detokenizer", "_silent", "_stops")

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str], stop_token_ids: Sequence[int]) -> None:
        self._detokenizer: Detokenizer | None = tokenizer.detokenizer() if tokenizer is not None else None
        self._stops = StopStrings(stops)
        self._silent = frozenset(stop_token_ids)

    def push(self, token_id: int) -> tuple[str, bool]:
        """The text that a token completes, and whether it completes a stop string."""
        if self._detokenizer is None or token_id in self._silent:
            return "", False
        return self._stops.push(self._detokenizer.push((token_id,)))

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self._detokenizer is None:
            return ""
        text, stopped = self._stops.push(self._detokenizer.finish())
        return text if stopped else text + self._stops.finish()
