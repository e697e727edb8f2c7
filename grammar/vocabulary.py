"""A model's vocabulary as constrained generation needs it: bytes of tokens, and masks over their ids."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from treadle.grammar.tool_text import CLOSE, OPEN

if TYPE_CHECKING:
    import xgrammar

Mask = torch.Tensor

NUM_COMPILE_THREADS = 2


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one model.

    `token_bytes` are the exact bytes of every id; `size` is the width of the model's logits, which may be larger.
    `special_ids` are no text. `stop_ids`, at least one, end a turn. Where `<tool_call>` or `</tool_call>` is one token,
    special or not, it stands for the tag alone and is no text either.
    """

    token_bytes: Sequence[bytes]
    special_ids: frozenset[int]
    stop_ids: tuple[int, ...]
    size: int

    def __post_init__(self) -> None:
        if not self.stop_ids or not all(0 <= stop_id < self.size for stop_id in self.stop_ids):
            raise ValueError("a vocabulary needs at least one stop id within its size, or no turn would ever end")
        if self.size < len(self.token_bytes):
            raise ValueError(f"{len(self.token_bytes)} tokens do not fit a vocabulary of size {self.size}")

    @cached_property
    def open_ids(self) -> tuple[int, ...]:
        """The token that is `<tool_call>`, if there is one."""
        found = self._tag_id(OPEN)
        return () if found is None else (found,)

    @cached_property
    def close_id(self) -> int | None:
        """The token that is `</tool_call>`, if there is one."""
        return self._tag_id(CLOSE)

    @cached_property
    def content_bytes(self) -> list[bytes]:
        """The text of every id of the logits: nothing for ids that are no text."""
        blank = {*self.special_ids, *self.stop_ids, *self.open_ids, self.close_id}
        texts = [b"" if i in blank else text for i, text in enumerate(self.token_bytes)]
        return texts + [b""] * (self.size - len(texts))

    @cached_property
    def sorted_tokens(self) -> list[tuple[bytes, int]]:
        """Tokens that are text, with their ids, in order of their bytes."""
        return sorted((text, i) for i, text in enumerate(self.content_bytes) if text)

    @cached_property
    def text_mask(self) -> Mask:
        """The bits of all tokens that are text, of the stop tokens, and of `<tool_call>` where it is a token."""
        return self.mask([*(i for _, i in self.sorted_tokens), *self.stop_ids, *self.open_ids])

    @cached_property
    def containing_tag(self) -> list[int]:
        """Tokens in which `<tool_call>` ends before the token does."""
        tag = OPEN.encode()
        return [i for text, i in self.sorted_tokens if 0 <= text.find(tag) < len(text) - len(tag)]

    def with_prefix(self, prefix: bytes) -> list[tuple[bytes, int]]:
        """Tokens that are text and begin with `prefix`."""
        tokens = self.sorted_tokens
        start = bisect.bisect_left(tokens, (prefix, -1))
        stop = start
        while stop < len(tokens) and tokens[stop][0].startswith(prefix):
            stop += 1
        return tokens[start:stop]

    def prefixes_of(self, text: bytes) -> list[int]:
        """Ids of the tokens with which `text` may begin."""
        found: list[int] = []
        for length in range(1, min(len(text), self._longest) + 1):
            found += self._ids_of.get(text[:length], ())
        return found

    def mask(self, ids: Iterable[int]) -> Mask:
        """A row of the bitmask, int32 [ceil(size / 32)], with the bits of `ids` set."""
        bits = np.zeros(-(-self.size // 32) * 32, dtype=np.uint8)
        bits[list(ids)] = 1
        return torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))

    def backend_compiler(self, cache_bytes: int) -> xgrammar.GrammarCompiler:
        """Imports the grammar library, which takes about a second, and hands it the vocabulary. 0 keeps no cache."""
        import xgrammar

        self.prefixes_of(b"<")
        assert self.text_mask is not None and self.containing_tag is not None
        info = xgrammar.TokenizerInfo(
            self.content_bytes,
            vocab_type=xgrammar.VocabType.RAW,
            vocab_size=self.size,
            stop_token_ids=list(self.stop_ids),
        )
        return xgrammar.GrammarCompiler(
            info, max_threads=NUM_COMPILE_THREADS, cache_enabled=cache_bytes > 0, cache_limit_bytes=cache_bytes
        )

    @cached_property
    def _ids_of(self) -> dict[bytes, list[int]]:
        ids: dict[bytes, list[int]] = {}
        for text, token_id in self.sorted_tokens:
            ids.setdefault(text, []).append(token_id)
        return ids

    @cached_property
    def _longest(self) -> int:
        return max((len(text) for text, _ in self.sorted_tokens), default=0)

    def _tag_id(self, tag: str) -> int | None:
        return next((i for i, text in enumerate(self.token_bytes) if text == tag.encode()), None)


def has(mask: Mask, token_id: int) -> bool:
    """Whether a row of the bitmask has the bit of an id."""
    return bool(int(mask[token_id >> 5]) >> (token_id & 31) & 1)
