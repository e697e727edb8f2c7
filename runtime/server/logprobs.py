"""Logprobs as clients read them: tokens as text and as bytes, for a token may be part of a character."""

from __future__ import annotations

from collections.abc import Iterable

from typing_extensions import TypedDict

from treadle.runtime.text.tokenizer import Tokenizer
from treadle.scheduler import TokenLogprob

LEAST = -9999.0
"""What stands for the logarithm of 0, which JSON cannot write."""


class Alternative(TypedDict):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class TokenEntry(Alternative):
    """A token that was chosen, and the most likely ones in its place."""

    top_logprobs: list[Alternative]


def token_entries(tokenizer: Tokenizer | None, logprobs: Iterable[TokenLogprob]) -> list[TokenEntry]:
    """An entry for each token. Without a tokenizer no token has any text."""
    return [
        {
            **_alternative(tokenizer, each.token_id, each.logprob),
            "top_logprobs": [_alternative(tokenizer, token_id, value) for token_id, value in each.top],
        }
        for each in logprobs
    ]


def _alternative(tokenizer: Tokenizer | None, token_id: int, logprob: float) -> Alternative:
    data = tokenizer.token_bytes(token_id) if tokenizer is not None else b""
    return {"token": data.decode(errors="replace"), "logprob": max(LEAST, logprob), "bytes": list(data)}
