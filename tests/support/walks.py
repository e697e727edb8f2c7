"""Text written at random, but only with the tokens that a grammar's mask allows."""

from __future__ import annotations

import random

import numpy as np
import torch

from treadle.grammar.matcher import Grammar, Matcher
from treadle.grammar.vocabulary import Vocabulary

# What to prefer, in this order, once a text is to come to its end.
CLOSING = [b'"', b"}", b"]", b"0", b"1", b"n", b"t", b"f", b",", b"[", b"{"]


def legal_ids(matcher: Matcher, vocabulary: Vocabulary) -> np.ndarray:
    """The ids whose bits are set, in order. The row is filled with dirt first: nothing of it may stay."""
    bitmask = torch.full((2, -(-vocabulary.size // 32)), 0x5A5A5A5A, dtype=torch.int32)
    assert matcher.fill(bitmask, 1)
    assert bool((bitmask[0] == 0x5A5A5A5A).all()), "another row was written"
    bits = np.unpackbits(bitmask[1].numpy().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits[: vocabulary.size])


def write(
    grammar: Grammar, vocabulary: Vocabulary, rng: random.Random, *, free_steps: int = 40, max_steps: int = 4_000
) -> tuple[Matcher, list[int]]:
    """A matcher at the end of a random text, and the text's ids without the stop token.

    Uniform among the legal ids for `free_steps`; after that it takes what ends the text soonest.
    """
    matcher = grammar.matcher()
    first = {vocabulary.content_bytes[i]: i for i in reversed(range(vocabulary.size))}
    closing = [first[text] for text in CLOSING if text in first]
    ids: list[int] = []
    for step in range(max_steps):
        legal = legal_ids(matcher, vocabulary)
        assert len(legal), f"nothing is legal after {text_of(ids, vocabulary)!r}"
        stops = [i for i in vocabulary.stop_ids if i in legal]
        assert bool(stops) == matcher.can_end
        if stops and (step >= free_steps or rng.random() < 0.2 or len(legal) == len(stops)):
            chosen = rng.choice(stops)
        elif step < free_steps:
            chosen = int(rng.choice(legal))
        else:
            allowed = set(legal.tolist())
            chosen = next((i for i in closing if i in allowed), int(legal[0]))
        assert matcher.accept(chosen), f"{chosen} is legal, but not accepted after {text_of(ids, vocabulary)!r}"
        if matcher.is_done:
            return matcher, ids
        ids.append(chosen)
    raise AssertionError(f"no end after {max_steps} tokens: {text_of(ids, vocabulary)[-200:]!r}")


def text_of(ids: list[int], vocabulary: Vocabulary) -> bytes:
    """The bytes of ids; tags that are tokens of their own included."""
    return b"".join(vocabulary.token_bytes[i] for i in ids)
