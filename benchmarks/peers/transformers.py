"""The continuous batching of transformers as an engine to compare, with its defaults for a processor."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

from peers.serving import Settings, serve

PAGE_TOKENS = 256
KV_TOKENS = 65_536
MAX_STEP_TOKENS = 2048
"""Both would be inferred from the memory of an accelerator."""
LONGEST_STEP_S = 600.0


class TransformersEngine:
    """A model, and the manager whose thread generates. Its blocks are shared by prompts that begin alike."""

    def __init__(self, settings: Settings) -> None:
        import torch
        import transformers

        library: Any = transformers
        logging.getLogger("transformers").setLevel(logging.ERROR)
        torch.set_num_threads(settings.threads)
        model = library.AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16).eval()
        self._manager: Any = model.init_continuous_batching(
            library.GenerationConfig(
                do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=settings.max_context
            ),
            library.ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=KV_TOKENS // PAGE_TOKENS,
                max_batch_tokens=MAX_STEP_TOKENS,
            ),
        )
        self._manager.start()
        self._num_requests = 0
        self._sequences: dict[str, str] = {}
        self._num_seen: dict[str, int] = {}
        self.version = f"transformers {version('transformers')}"
        self.precision = "bfloat16"

    def begin(self, num_sequences: int, max_tokens: int, *, share_prefix: bool) -> None:
        self._sequences.clear()
        self._num_seen.clear()

    def add(self, sequence: str, conversation: str, token_ids: list[int], new_tokens: int) -> None:
        self._num_requests += 1
        request = f"request-{self._num_requests}"
        self._sequences[request] = sequence
        self._manager.add_request(token_ids, request, max_new_tokens=new_tokens, streaming=True, eos_token_id=-1)

    def step(self) -> list[tuple[str, list[int]]]:
        output = self._manager.get_result(timeout=LONGEST_STEP_S)
        if output is None or output.error is not None:
            raise RuntimeError(f"transformers generates no more: {output.error if output else 'its thread has ended'}")
        request, tokens = output.request_id, output.generated_tokens
        num_seen = self._num_seen.get(request, 0)
        self._num_seen[request] = len(tokens)
        return [(self._sequences[request], list(tokens[num_seen:]))]

    def close(self) -> None:
        self._manager.stop(block=True, timeout=1.0)


if __name__ == "__main__":
    serve(TransformersEngine)
