"""Puts an engine together from a model and a configuration."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from treadle.grammar.compiler import Compiler
from treadle.grammar.vocabulary import Vocabulary
from treadle.runtime.engine.cgroup import usable_cores
from treadle.runtime.engine.config import EngineConfig, default_num_threads, torch_dtype
from treadle.runtime.engine.device import Device, open_device
from treadle.runtime.engine.engine import Engine
from treadle.runtime.engine.graphs import DecodeGraphs
from treadle.runtime.engine.learned import LearnedFile
from treadle.runtime.engine.memory import max_context, num_kv_pages
from treadle.runtime.engine.native import find_native
from treadle.runtime.engine.runner import Runner
from treadle.runtime.engine.state import DeviceState
from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.models.checkpoint import Checkpoint
from treadle.runtime.models.decoder import Decoder, load_decoder
from treadle.scheduler import Scheduler, SchedulerConfig

if TYPE_CHECKING:
    from treadle.runtime.text.tokenizer import Tokenizer


def build_engine(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    config: EngineConfig,
    clock: Callable[[], float] = time.perf_counter,
) -> Engine:
    """Loads the weights and sets up an engine on this machine. Without a tokenizer it gives tokens but no text.

    Raises `ModelError` for weights that are missing or damaged, `InvalidRequestError` for settings that cannot be, and
    for a model that memory cannot hold.
    """
    torch.set_num_threads(config.num_threads or default_num_threads(torch.get_num_threads(), usable_cores()))
    model, dtype = checkpoint.config, torch_dtype(config.dtype, config.device)
    native = find_native(model, config)
    device = open_device(config.device, native)
    scheduler = _build_scheduler(checkpoint, config)
    learned = LearnedFile(config.learned, scheduler.books) if config.learned is not None else None
    state = DeviceState(
        model,
        dtype,
        scheduler.config.num_pages,
        config.page_size,
        config.num_slots,
        scheduler.limits.max_context,
        device,
        config.host_pages,
    )
    decoder = load_decoder(
        checkpoint,
        dtype,
        device.torch_device,
        ops=device.ops,
        weights=config.weights,
        packed_weights=config.packed_weights,
        native=native,
    )
    graphs = _decode_graphs(decoder, state, device, config)
    runner = Runner(decoder, state, device, graphs, cascade=config.cascade)
    overlap = device.runs_ahead if config.overlap is None else config.overlap
    compiler = build_compiler(tokenizer, model.vocab_size) if tokenizer is not None else None
    return Engine(scheduler, runner, tokenizer, compiler, clock, learned, overlap=overlap)


def _decode_graphs(decoder: Decoder, state: DeviceState, device: Device, config: EngineConfig) -> DecodeGraphs | None:
    kernels = device.ops.paged
    if not config.graphs or kernels is None or device.torch_device.type != "cuda":
        return None
    return DecodeGraphs(decoder, state, kernels, device, config.num_slots)


def _build_scheduler(checkpoint: Checkpoint, config: EngineConfig) -> Scheduler:
    """A scheduler whose pages, in both tiers, fit beside the weights into the memory that this process may use."""
    model, num_pages = checkpoint.config, num_kv_pages(checkpoint, config)
    try:
        return Scheduler(
            SchedulerConfig(
                num_pages=num_pages,
                vocab_size=model.vocab_size,
                max_context=max_context(model, config),
                page_size=config.page_size,
                num_slots=config.num_slots,
                max_step_tokens=config.max_step_tokens,
                order=config.order,
                retention=config.retention,
                admission=config.admission,
                num_host_pages=config.host_pages,
                max_step_moves=config.max_step_moves,
                costs=config.costs,
                prefix_cache=config.prefix_cache,
            )
        )
    except ValueError as error:
        raise InvalidRequestError(str(error)) from None


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
