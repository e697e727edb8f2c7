"""Where one sequence stands in its grammar: which tokens may come next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from treadle.grammar.tool_text import ToolCall
from treadle.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    import xgrammar


class Matcher(ABC):
    """The state of one sequence. It belongs to one thread at a time.

    Stop tokens are legal only where the text may end, and nothing else is legal where it must.
    """

    @abstractmethod
    def accept(self, token_id: int) -> bool:
        """Moves on by a token; False, and no move, if it is not legal here. Exactly the ids that `fill` allows are."""

    @abstractmethod
    def fill(self, bitmask: torch.Tensor, row: int) -> bool:
        """Writes the legal ids into a row of `bitmask`, an int32 CPU tensor [num_rows, ceil(size / 32)].

        False if every id is allowed, as after the end: nothing was written then. Bits past `size` mean nothing.
        """

    @abstractmethod
    def rollback(self, count: int) -> None:
        """Takes back the last `count` accepted tokens, stop tokens included."""

    @abstractmethod
    def fork(self) -> Matcher:
        """A second matcher in this state, with its own future and the same past to roll back into."""

    @abstractmethod
    def forced(self) -> str:
        """Text that must come next, whatever the tokens that spell it; empty where there is a choice."""

    @property
    @abstractmethod
    def can_end(self) -> bool:
        """Whether a stop token is legal now."""

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether a stop token was accepted."""

    @property
    def tool_name(self) -> str | None:
        """The tool that the call under way must be of, as soon as that is certain. None outside calls."""
        return None

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls that are complete so far."""
        return ()


class Grammar(ABC):
    """A compiled constraint. Safe to share among threads and sequences.

    `unenforced` lists JSON pointers, in the schema, of the keywords that the grammar does not guarantee. `parts` are
    other grammars that it is made of, `num_bytes` is about what it takes up without them.
    """

    unenforced: tuple[str, ...]
    num_bytes: int
    parts: tuple[Grammar, ...] = ()

    @abstractmethod
    def matcher(self) -> Matcher:
        """A matcher at the beginning."""


class ContentGrammar(Grammar):
    """A grammar for the whole of a text."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, unenforced: tuple[str, ...], vocabulary: Vocabulary) -> None:
        self.unenforced = unenforced
        self.num_bytes = compiled.memory_size_bytes
        self._compiled = compiled
        self._vocabulary = vocabulary

    def matcher(self) -> ContentMatcher:
        import xgrammar

        return ContentMatcher(xgrammar.GrammarMatcher(self._compiled), self._vocabulary)


class ContentMatcher(Matcher):
    """A matcher over a `ContentGrammar`."""

    def __init__(self, state: xgrammar.GrammarMatcher, vocabulary: Vocabulary) -> None:
        self._state = state
        self._vocabulary = vocabulary

    def accept(self, token_id: int) -> bool:
        assert 0 <= token_id < self._vocabulary.size, f"token {token_id} is not in the vocabulary"
        return not self._state.is_terminated() and self._state.accept_token(token_id)

    def accept_text(self, text: bytes) -> bool:
        """Moves on by text that need not be whole tokens. Counts as one token for `rollback`."""
        return self._state.accept_string(text)

    def fill(self, bitmask: torch.Tensor, row: int) -> bool:
        return not self._state.is_terminated() and self._state.fill_next_token_bitmask(bitmask, row)

    def rollback(self, count: int) -> None:
        self._state.rollback(count)

    def fork(self) -> ContentMatcher:
        return ContentMatcher(self._state.fork(), self._vocabulary)

    def forced(self) -> str:
        try:
            return "" if self._state.is_terminated() else self._state.find_jump_forward_string()
        except UnicodeDecodeError as error:
            # What is forced may be part of a character, at either end.
            return bytes(error.object[: error.start]).decode()

    @property
    def can_end(self) -> bool:
        return self._state.is_completed() and not self._state.is_terminated()

    @property
    def is_done(self) -> bool:
        return self._state.is_terminated()
