"""llama.cpp as an engine to compare, through the low-level interface of llama-cpp-python.

That interface has batches of tokens of many sequences, and leaves their schedule to its user. The one here is that of
llama.cpp's server: a token for each sequence that decodes, then parts of prompts, up to `n_batch` tokens in all. What
a prompt shares with another conversation is copied to it once it is computed, and what it shares with its own is there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import takewhile
from typing import Any

from peers.serving import Settings, serve

LEAST_SHARED = 16
"""Tokens that are worth a copy; fewer are alike by chance."""


@dataclass(slots=True, eq=False)
class Slot:
    """A conversation: its tokens, how many of them are in the KV cache, and where they end.

    Until `source` has computed `num_shared` tokens, which are this one's too, nothing is computed here.
    """

    number: int
    sequence: str = ""
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    end: int = 0
    source: Slot | None = None
    num_shared: int = 0

    @property
    def is_active(self) -> bool:
        return len(self.tokens) < self.end

    @property
    def num_waiting(self) -> int:
        return len(self.tokens) - self.num_computed


class LlamaCppEngine:
    """A model, and a context of the size of the workload.

    Sequences that share nothing have a KV stream each, as in llama.cpp's own benchmark of batches. Those that share a
    prefix have one together, as in its server: steps that mix lengths are cut up stream by stream otherwise.
    """

    def __init__(self, settings: Settings) -> None:
        import llama_cpp

        self._library: Any = llama_cpp
        self._threads = settings.threads
        llama_cpp.llama_backend_init()
        path = os.fsencode(settings.model)
        self._model: Any = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"{settings.model}: llama.cpp cannot load it")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context: Any = None
        self._batch: Any = None
        self._memory: Any = None
        self._room: tuple[int, int, bool] | None = None
        self._num_batch = 0
        self._slots: dict[str, Slot] = {}
        self.version = f"llama-cpp-python {version('llama-cpp-python')}"
        self.precision = f"{self._description()}, KV in float16"

    def begin(self, num_sequences: int, max_tokens: int, *, share_prefix: bool) -> None:
        self._slots.clear()
        if self._room == (num_sequences, max_tokens, share_prefix):
            self._library.llama_memory_clear(self._memory, False)
            return
        self._close_context()
        self._open_context(num_sequences, max_tokens, share_prefix)
        self._room = num_sequences, max_tokens, share_prefix

    def add(self, sequence: str, conversation: str, token_ids: list[int], new_tokens: int) -> None:
        slot = self._slots.get(conversation)
        if slot is None:
            slot = Slot(len(self._slots))
            if self._room is not None and self._room[2]:
                self._find_source(slot, token_ids)
            self._slots[conversation] = slot
        else:
            assert token_ids[: slot.num_computed] == slot.tokens[: slot.num_computed]
        slot.sequence, slot.tokens, slot.end = sequence, token_ids, len(token_ids) + new_tokens

    def step(self) -> list[tuple[str, list[int]]]:
        sampled = self._fill_batch()
        if self._library.llama_decode(self._context, self._batch) != 0:
            raise RuntimeError("llama_decode failed")
        if not sampled:
            return []
        import numpy as np

        logits = self._library.llama_get_logits(self._context)
        tokens = np.ctypeslib.as_array(logits, (len(sampled), self._vocab_size)).argmax(axis=1).tolist()
        for slot, token in zip(sampled, tokens, strict=True):
            slot.tokens.append(token)
        return [(slot.sequence, [token]) for slot, token in zip(sampled, tokens, strict=True)]

    def close(self) -> None:
        self._close_context()
        self._library.llama_model_free(self._model)

    def _find_source(self, slot: Slot, token_ids: list[int]) -> None:
        for other in self._slots.values():
            pairs = zip(token_ids[:-1], other.tokens, strict=False)
            num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if num_shared > max(slot.num_shared, LEAST_SHARED - 1):
                slot.source, slot.num_shared = other, num_shared

    def _fill_batch(self) -> list[Slot]:
        """Chooses the tokens of a step; the slots that get a new token of it."""
        self._batch.n_tokens = 0
        sampled = []
        ready = [slot for slot in self._slots.values() if slot.is_active and self._has_shared(slot)]
        for slot in sorted(ready, key=lambda slot: slot.num_waiting > 1):
            count = min(slot.num_waiting, self._num_batch - self._batch.n_tokens)
            is_complete = count == slot.num_waiting
            self._append(slot, count, sample=is_complete)
            slot.num_computed += count
            if is_complete:
                sampled.append(slot)
        return sampled

    def _has_shared(self, slot: Slot) -> bool:
        """Whether a slot has what it shares with another. In one KV stream a copy is a note in the cells."""
        if slot.source is not None and slot.source.num_computed >= slot.num_shared:
            self._library.llama_memory_seq_cp(self._memory, slot.source.number, slot.number, 0, slot.num_shared)
            slot.num_computed, slot.source = slot.num_shared, None
        return slot.source is None

    def _append(self, slot: Slot, count: int, *, sample: bool) -> None:
        batch, first = self._batch, self._batch.n_tokens
        for index, position in enumerate(range(slot.num_computed, slot.num_computed + count), first):
            batch.token[index] = slot.tokens[position]
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = slot.number
            batch.logits[index] = 0
        batch.n_tokens = first + count
        if sample:
            batch.logits[batch.n_tokens - 1] = 1

    def _open_context(self, num_sequences: int, max_tokens: int, share_prefix: bool) -> None:
        library = self._library
        options = library.llama_context_default_params()
        options.n_ctx = num_sequences * -(-max_tokens // 256) * 256
        options.n_seq_max = num_sequences
        options.n_threads = options.n_threads_batch = self._threads
        options.kv_unified = share_prefix
        self._context = library.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no room for {num_sequences} sequences of {max_tokens} tokens")
        self._memory = library.llama_get_memory(self._context)
        self._num_batch = library.llama_n_batch(self._context)
        self._batch = library.llama_batch_init(self._num_batch, 0, 1)

    def _close_context(self) -> None:
        if self._context is not None:
            self._library.llama_batch_free(self._batch)
            self._library.llama_free(self._context)
            self._context = None

    def _description(self) -> str:
        import ctypes

        text = ctypes.create_string_buffer(128)
        self._library.llama_model_desc(self._model, text, len(text))
        return text.value.decode()


if __name__ == "__main__":
    serve(LlamaCppEngine)
