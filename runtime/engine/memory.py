"""Whether a model fits into the memory that this process may use, found out before its weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from treadle.kernels.codes import GROUP, Int4Matrix, Int8Matrix
from treadle.kernels.int4 import can_multiply_int4
from treadle.kernels.linear import can_pack
from treadle.runtime.engine.cgroup import usable_memory
from treadle.runtime.engine.config import EngineConfig, kv_bytes_per_token, torch_dtype
from treadle.runtime.engine.native import is_native
from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.models.checkpoint import Checkpoint
from treadle.runtime.models.config import INT4_WEIGHTS, ModelConfig, Weights

DEFAULT_KV_BYTES = 2 * 2**30
LEAST_CONTEXT, CONTEXT_STEP = 2048, 1024
"""Tokens: the shortest context that is worth proposing, and what it is rounded to."""
INT4_BYTES, INT8_BYTES = 0.5 + 2 * 2 / GROUP, 1 + 2 * 2 / GROUP
"""Of a weight in codes, with its share of a scale and a minimum."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model takes: bytes of its weights and of a page of KV, and pages of one context.

    Reading the weights takes some more, for one tensor at a time.
    """

    weights: int
    page: int
    context_pages: int


def num_kv_pages(checkpoint: Checkpoint, config: EngineConfig) -> int:
    """The size of the KV pool: what was asked for, or what is usual for the device.

    On a CPU that is 2 GiB; an eighth of the memory, or what the weights leave of it, where that is less. On a GPU,
    which is there for nothing else, it is nine tenths of what the weights leave. It is never less than one context.

    Raises `InvalidRequestError` if the weights and the pages do not fit into the memory, with what would fit.
    """
    on_gpu = config.device == "cuda"
    memory, needs = _free_gpu_memory() if on_gpu else usable_memory(), footprint(checkpoint, config)
    pages = config.num_pages or needs.context_pages
    free = memory - needs.weights - (0 if on_gpu else config.host_pages * needs.page)
    if pages * needs.page > free:
        raise InvalidRequestError(_too_large(checkpoint, config, memory))
    if on_gpu and config.host_pages * needs.page > usable_memory():
        raise InvalidRequestError(
            f"{config.host_pages} host pages take {_gib(config.host_pages * needs.page)}, and this process may use "
            f"{_gib(usable_memory())}; use fewer"
        )
    if config.num_pages is not None:
        return config.num_pages
    usual = free * 9 // 10 if on_gpu else min(DEFAULT_KV_BYTES, memory // 8, free)
    return max(usual // needs.page, needs.context_pages)


def _free_gpu_memory() -> int:
    free, _ = torch.cuda.mem_get_info()
    return free


def footprint(checkpoint: Checkpoint, config: EngineConfig) -> Footprint:
    """What a model takes. Of a checkpoint whose matrices are stored in several ways, one speaks for all."""
    model, dtype = checkpoint.config, torch_dtype(config.dtype, config.device)
    embedding = model.vocab_size * model.hidden_size
    matrices = model.num_parameters - embedding * (1 if model.tied_embeddings else 2)
    per_weight = _bytes_per_weight(checkpoint, config, dtype)
    weights = matrices * per_weight + embedding * (dtype.itemsize + _head_bytes(checkpoint, config, dtype))
    page = config.page_size * kv_bytes_per_token(model, dtype)
    return Footprint(int(weights), page, -(-max_context(model, config) // config.page_size))


def max_context(model: ModelConfig, config: EngineConfig) -> int:
    """Most tokens of a call."""
    return min(config.max_context or model.max_context, model.max_context)


def _bytes_per_weight(checkpoint: Checkpoint, config: EngineConfig, dtype: torch.dtype) -> float:
    """Of the layers' matrices: in codes, in the model's type, or in both."""
    stored = checkpoint.codes("model.layers.0.self_attn.k_proj.weight")
    in_int4 = config.weights in INT4_WEIGHTS or (isinstance(stored, Int4Matrix) and config.weights != "full")
    in_int8 = config.weights == "int8" or (isinstance(stored, Int8Matrix) and config.weights != "full")
    if is_native(checkpoint.config, config):
        return INT4_BYTES if in_int4 else INT8_BYTES if in_int8 else dtype.itemsize
    in_int4 = in_int4 and can_multiply_int4(torch.device(config.device), dtype)
    return (INT4_BYTES if in_int4 else 0) + (0 if config.weights == "int4-only" else dtype.itemsize)


def _head_bytes(checkpoint: Checkpoint, config: EngineConfig, dtype: torch.dtype) -> float:
    """Of a weight of the head, beside the embedding."""
    tied = checkpoint.config.tied_embeddings
    if not is_native(checkpoint.config, config):
        is_packed = config.packed_weights and can_pack(torch.device(config.device), dtype)
        return dtype.itemsize if not tied or is_packed else 0
    stored = checkpoint.codes("model.embed_tokens.weight" if tied else "lm_head.weight")
    if stored is None or config.weights == "full":
        return dtype.itemsize
    return INT4_BYTES if isinstance(stored, Int4Matrix) else INT8_BYTES


def _too_large(checkpoint: Checkpoint, config: EngineConfig, memory: int) -> str:
    """What does not fit, how much is missing, and what would fit."""
    needs = footprint(checkpoint, config)
    host_pages = config.host_pages if config.device == "cpu" else 0
    pages = (config.num_pages or needs.context_pages) + host_pages
    if config.num_pages is not None:
        kinds = f"{config.num_pages} KV pages"
    else:
        kinds = f"KV pages of one context of {max_context(checkpoint.config, config):,} tokens"
    if host_pages:
        kinds += f" and {host_pages} host pages"
    least = 1 if config.num_pages is not None else needs.context_pages
    if needs.weights + least * needs.page <= memory:
        fix = "fewer pages"
    else:
        fix = ", or ".join(_fits(checkpoint, config, memory)) or "a smaller model"
    missing = needs.weights + pages * needs.page - memory
    where = "this process may use" if config.device == "cpu" else "the GPU has free"
    return (
        f"{kinds} take {_gib(pages * needs.page)} and the weights {_gib(needs.weights)}, {_gib(missing)} more than the "
        f"{_gib(memory)} that {where}; use {fix}"
    )


def _fits(checkpoint: Checkpoint, config: EngineConfig, memory: int) -> Iterator[str]:
    """The smallest changes to a configuration with which the model fits, in words: of weights and context, and of
    weights alone."""
    whole = max_context(checkpoint.config, config)
    contexts = [(form, _fitting_context(checkpoint, form, memory)) for form in (config, *_smaller(checkpoint, config))]
    for form, context in contexts:
        if min(LEAST_CONTEXT, whole) <= context < whole:
            yield " and ".join((*_words(config, form), f"max_context={context}"))
            break
    for form, context in contexts:
        if context == whole:
            yield " and ".join(_words(config, form))
            break


def _smaller(checkpoint: Checkpoint, config: EngineConfig) -> Iterator[EngineConfig]:
    """Configurations with smaller weights, the nearest first."""
    if torch_dtype(config.dtype, config.device) == torch.float32:
        config = replace(config, dtype="bfloat16")
        yield config
    forms: tuple[Weights, ...] = ("full",)
    if is_native(checkpoint.config, config):
        forms = ("full", "int8", "int4")
    elif can_multiply_int4(torch.device(config.device), torch.bfloat16):
        forms = ("full", "int4-only")
    least = footprint(checkpoint, config).weights
    for smaller in (replace(config, weights=weights) for weights in forms):
        if footprint(checkpoint, smaller).weights < least:
            yield smaller


def _fitting_context(checkpoint: Checkpoint, config: EngineConfig, memory: int) -> int:
    """The longest context that fits beside the weights, in tokens; 0 or less if none does."""
    needs, whole = footprint(checkpoint, config), max_context(checkpoint.config, config)
    pages = (memory - needs.weights) // needs.page
    return whole if pages >= needs.context_pages else pages * config.page_size // CONTEXT_STEP * CONTEXT_STEP


def _words(config: EngineConfig, changed: EngineConfig) -> list[str]:
    """The settings that differ, as they are written."""
    names = [name for name in ("dtype", "weights") if getattr(config, name) != getattr(changed, name)]
    return [f"{name}={getattr(changed, name)!r}" for name in names]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
