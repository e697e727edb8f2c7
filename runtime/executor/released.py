"""The token ids that stand for an output in other prompts, as soon as they can be told.

They are those that the model generated, up to a stop string. A token is passed on when all of its text has been
released: what may be half a character or part of a stop string is held back. If a stop string begins within a token,
what that token says before it is tokenised once, alone.

    stop = " END"
    generated   | Once | upon | a | fox. |  E | NDs |            stop = "x."
    released     Once   upon   a   fox.                          Once   upon   a   fo
    passed on   | Once | upon | a | fox. |                       | Once | upon | a | fo |
                                                                                      `- "fo", tokenised alone

So a prompt is the same whether the output was streamed into it or was there before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from treadle.runtime.text.tokenizer import Tokenizer


class ReleasedIds:
    """Follows one output. How ids and text are grouped makes no difference.

    Tokens that share a character are passed on together.

    Attributes:
        token_ids: All that was passed on so far.
    """

    __slots__ = ("_detokenizer", "_held", "_num_generated", "_num_passed", "_text", "_tokenizer", "_unit", "token_ids")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.token_ids: tuple[int, ...] = ()
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer()
        self._unit: tuple[int, ...] = ()
        """Ids since the last border of both tokens and characters."""
        self._held: deque[tuple[int, tuple[int, ...]]] = deque()
        """Units that wait for their text, and where that ends. Positions count characters of the whole output."""
        self._num_generated = 0
        self._num_passed = 0
        self._text = ""
        """What was released and not passed on."""

    def push(self, token_ids: Iterable[int], text: str) -> tuple[int, ...]:
        """Takes what was generated, and the text released with it. Returns the ids that can be passed on now."""
        for token_id in token_ids:
            self._num_generated += len(self._detokenizer.push((token_id,)))
            self._unit += (token_id,)
            if not self._detokenizer.is_within_character:
                self._end_unit()
        return self._pass_on(text)

    def finish(self, text: str) -> tuple[int, ...]:
        """Takes the text released at the end. Returns the last ids."""
        self._num_generated += len(self._detokenizer.finish())
        self._end_unit()
        ids = self._pass_on(text)
        if self._text:
            rest = tuple(self._tokenizer.encode(self._text, continues=self._num_passed > 0))
            self.token_ids += rest
            self._text = ""
            ids += rest
        return ids

    def _end_unit(self) -> None:
        if self._unit:
            self._held.append((self._num_generated, self._unit))
            self._unit = ()

    def _pass_on(self, text: str) -> tuple[int, ...]:
        self._text += text
        num_released = self._num_passed + len(self._text)
        ids: tuple[int, ...] = ()
        end = self._num_passed
        while self._held and self._held[0][0] <= num_released:
            end, unit = self._held.popleft()
            ids += unit
        self._text = self._text[end - self._num_passed :]
        self._num_passed = end
        self.token_ids += ids
        return ids
