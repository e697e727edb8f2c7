"""What a command may ask for: each check returns None, or an error code and a sentence that says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from treadle.scheduler.commands import ErrorCode

Problem: TypeAlias = tuple[ErrorCode, str] | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model and the pool can hold: tokens of a context, tokens of the whole pool, size of the vocabulary."""

    model_context: int
    pool_tokens: int
    vocab_size: int | None

    @property
    def max_context(self) -> int:
        """Most tokens of a call, prompt and generation together."""
        return min(self.model_context, self.pool_tokens)

    def tokens(self, token_ids: Sequence[int]) -> Problem:
        """Token ids must be in the vocabulary."""
        if self.vocab_size is not None and token_ids and not (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            return "bad_token", f"token ids must lie in 0 .. {self.vocab_size - 1}"
        return None

    def length(self, num_prompt_tokens: int, max_tokens: int | None) -> Problem:
        """Prompt and generation must fit the context."""
        if max_tokens is not None and max_tokens < 1:
            return "bad_max_tokens", f"max_tokens is {max_tokens}; ask for at least 1"
        if num_prompt_tokens >= self.max_context:
            text = f"the prompt has {num_prompt_tokens} tokens and must leave room for one more"
            if self.pool_tokens < self.model_context:
                return (
                    "prompt_too_long",
                    f"{text}; the KV pool holds {self.pool_tokens}: give it more pages, or shorten it",
                )
            return "prompt_too_long", f"{text}; the model's context is {self.model_context}: shorten it"
        if max_tokens is not None and num_prompt_tokens + max_tokens > self.max_context:
            text = f"max_tokens {max_tokens} and {num_prompt_tokens} prompt tokens exceed the context"
            text += f" of {self.max_context}; ask for at most {self.max_context - num_prompt_tokens}"
            return "bad_max_tokens", text
        return None
