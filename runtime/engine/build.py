"""Puts an engine together from a model and a configuration."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from treadle.grammar.compiler import Compiler
from treadle.grammar.vocabulary import Vocabulary
from treadle.runtime.engine.attention import DeviceState
from treadle.runtime.engine.cgroup import usable_cores, usable_memory
from treadle.runtime.engine.config import (
    EngineConfig,
    default_num_pages,
    default_num_threads,
    kv_bytes_per_token,
    torch_dtype,
)
from treadle.runtime.engine.device import CPU
from treadle.runtime.engine.engine import Engine
from treadle.runtime.engine.runner import Runner
from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.models.checkpoint import Checkpoint
from treadle.runtime.models.decoder import load_decoder
from treadle.scheduler import Scheduler, SchedulerConfig

if TYPE_CHECKING:
    from treadle.runtime.text.tokenizer import Tokenizer


def build_engine(checkpoint: Checkpoint, tokenizer: Tokenizer | None, config: EngineConfig) -> Engine:
    """Loads the weights and sets up an engine on this machine. Without a tokenizer it gives tokens but no text.

    Raises `ModelError` for weights that are missing or damaged, `InvalidRequestError` for settings that cannot be.
    """
    torch.set_num_threads(config.num_threads or default_num_threads(torch.get_num_threads(), usable_cores()))
    model, dtype, device = checkpoint.config, torch_dtype(config.dtype), CPU()
    max_context = min(config.max_context or model.max_context, model.max_context)
    num_pages = config.num_pages or default_num_pages(model, dtype, config.page_size, max_context)
    pool_bytes, memory = num_pages * config.page_size * kv_bytes_per_token(model, dtype), usable_memory()
    if pool_bytes > memory:
        text = f"{num_pages} KV pages take {pool_bytes / 2**30:.1f} GiB, the machine has {memory / 2**30:.1f} GiB"
        raise InvalidRequestError(f"{text}; use fewer pages")
    try:
        scheduler = Scheduler(
            SchedulerConfig(
                num_pages=num_pages,
                vocab_size=model.vocab_size,
                max_context=max_context,
                page_size=config.page_size,
                num_slots=config.num_slots,
                max_step_tokens=config.max_step_tokens,
                order=config.order,
                retention=config.retention,
                prefix_cache=config.prefix_cache,
            )
        )
    except ValueError as error:
        raise InvalidRequestError(str(error)) from None
    state = DeviceState(model, dtype, num_pages, config.page_size, config.num_slots, scheduler.limits.max_context)
    decoder = load_decoder(checkpoint, dtype, device.torch_device, packed_weights=config.packed_weights)
    runner = Runner(decoder, state, device)
    overlap = device.runs_ahead if config.overlap is None else config.overlap
    compiler = build_compiler(tokenizer, model.vocab_size) if tokenizer is not None else None
    return Engine(scheduler, runner, tokenizer, compiler, time.perf_counter, overlap=overlap)


def build_compiler(tokenizer: Tokenizer, vocab_size: int) -> Compiler:
    """A grammar compiler for the tokens of a model; it loads its library when it first compiles."""
    size = tokenizer.vocab_size
    vocabulary = Vocabulary(
        token_bytes=[tokenizer.token_bytes(token_id) for token_id in range(size)],
        special_ids=tokenizer.special_ids,
        stop_ids=tokenizer.eos_token_ids,
        size=vocab_size,
    )
    return Compiler(vocabulary)
