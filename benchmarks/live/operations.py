"""Every tensor operation of a decoder on noise, in the shape of a model: how to run it, and what it should give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.kernels import reference, sampling
from treadle.runtime.engine.device import Device
from treadle.runtime.models.config import ModelConfig
from treadle.runtime.models.rope import Rope

Result: TypeAlias = Tensor | tuple[Tensor, ...]
PAGE = 16
OWN = 64
"""Tokens of each context that are its own, where the others are shared."""


def relative_error(found: Result, exact: Result) -> float:
    """The norm of the difference, by the norm of what is exact."""
    found, exact = _flat(found), _flat(exact)
    return float((found - exact).norm() / exact.norm())


def share_of_others(found: Result, exact: Result) -> float:
    """The share of elements that are not the same."""
    return float((_flat(found) != _flat(exact)).double().mean())


def _flat(result: Result) -> Tensor:
    parts = (result,) if isinstance(result, Tensor) else result
    return torch.cat([part.double().flatten() for part in parts])


@dataclass(frozen=True, slots=True)
class Case:
    """An operation with operands.

    Attributes:
        run: Gives the operation's result.
        exact: Gives it in float64.
        num_bytes, num_flops: What it must at least read and write, and the floating-point operations of its products.
        error: Between the two results.
    """

    operation: str
    parameters: dict[str, int | str]
    run: Callable[[], Result]
    exact: Callable[[], Result]
    num_bytes: int
    num_flops: int = 0
    error: Callable[[Result, Result], float] = relative_error


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rows and contexts of decoding, tokens of prefills and of the operations between products, rows that choose, and
    pages that are copied."""

    batches: tuple[int, ...] = (1, 16, 64)
    contexts: tuple[int, ...] = (1024, 4096)
    prefills: tuple[int, ...] = (512, 2048)
    tokens: tuple[int, ...] = (64, 2048)
    rows: int = 64
    pages: int = 64


class Operations:
    """Cases of one model on one device."""

    def __init__(self, shape: ModelConfig, device: Device, dtype: torch.dtype) -> None:
        self._shape = shape
        self._dtype = dtype
        self._where = device.torch_device
        self._ops = device.ops

    def cases(self, sizes: Sizes) -> Iterator[Case]:
        """One at a time, so that the operands of no two need to be in memory together."""
        for batch in sizes.batches:
            for context in sizes.contexts:
                yield self.decode_attention(batch, context)
                if self._ops.paged is None and batch > 1:
                    yield self.shared_decode_attention(batch, context)
        yield from map(self.prefill_attention, sizes.prefills)
        for tokens in sizes.tokens:
            yield from self.between_products(tokens)
            yield self.norm_rope_write(tokens)
        for kind in ("greedy", "top-k and top-p", "masked"):
            yield self.choose(sizes.rows, kind)
        yield self.copy_pages(sizes.pages)

    def decode_attention(self, batch: int, context: int) -> Case:
        cache, table, places = self._contexts(batch, context)
        q = self._noise(batch, self._shape.num_heads, self._shape.head_dim)
        if (paged := self._ops.paged) is None:
            run = partial(reference.decode_attention, q, cache, places, None)
        else:
            lengths = torch.full((batch,), context, dtype=torch.int32, device=self._where)
            splits = paged.num_splits(batch, self._shape.num_kv_heads)
            run = partial(paged.decode, q, cache, table, self._numbers(batch), lengths, num_splits=splits)
        named: dict[str, int | str] = {"batch": batch, "context": context}
        exact = partial(exact_attention, q, cache, places)
        return Case("decode_attention", named, run, exact, cache.nbytes + 2 * q.nbytes, 4 * q.numel() * context)

    def shared_decode_attention(self, batch: int, context: int) -> Case:
        """Decoding where all of the contexts but their last tokens is the same pages."""
        cache, _, places = self._contexts(batch, context)
        shared, own = places[0, :-OWN], places[:, -OWN:]
        q = self._noise(batch, self._shape.num_heads, self._shape.head_dim)
        run = partial(reference.shared_decode_attention, q, cache, shared, own, None)
        exact = partial(exact_attention, q, cache, torch.cat((shared.expand(batch, -1), own), 1))
        named: dict[str, int | str] = {"batch": batch, "context": context, "own": OWN}
        read = cache[:, 0, 0].nbytes * (len(shared) + own.numel())
        return Case("shared_decode_attention", named, run, exact, read + 2 * q.nbytes, 4 * q.numel() * context)

    def prefill_attention(self, tokens: int) -> Case:
        cache, table, places = self._contexts(1, tokens)
        q = self._noise(tokens, self._shape.num_heads, self._shape.head_dim)
        if (paged := self._ops.paged) is None:
            run = partial(reference.prefill_attention, q, cache, places[0], None)
        else:
            starts = torch.tensor([0, tokens], dtype=torch.int32, device=self._where)
            run = partial(paged.prefill, q, cache, table, self._numbers(1), starts, starts[1:], max_new=tokens)
        exact = partial(exact_attention, q, cache, places)
        # On average a token sees half of the context.
        flops = 2 * q.numel() * (tokens + 1)
        return Case("prefill_attention", {"tokens": tokens}, run, exact, cache.nbytes + 2 * q.nbytes, flops)

    def between_products(self, tokens: int) -> Iterator[Case]:
        """The operations that read and write a row for each token, and nothing else."""
        size, eps = self._shape.hidden_size, self._shape.rms_norm_eps
        x, residual, weight = self._noise(tokens, size), self._noise(tokens, size), self._noise(size)
        gate_up = self._noise(tokens, 2 * self._shape.intermediate_size)
        for name, operands, options, num_bytes in (
            ("rms_norm", (x, weight), (eps,), 2 * x.nbytes),
            ("add_rms_norm", (x, residual, weight), (eps,), 4 * x.nbytes),
            ("swiglu", (gate_up,), (), gate_up.nbytes * 3 // 2),
        ):
            run = partial(getattr(self._ops, name), *operands, *options)
            exact = partial(getattr(reference, name), *(operand.double() for operand in operands), *options)
            yield Case(name, {"tokens": tokens}, run, exact, num_bytes)

    def norm_rope_write(self, tokens: int) -> Case:
        shape, eps = self._shape, self._shape.rms_norm_eps
        cache, _, (places,) = self._contexts(1, tokens)
        qkv = self._noise(tokens, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
        q_norm, k_norm = self._noise(2, shape.head_dim) if shape.qk_norm else (None, None)
        cos, sin = Rope(shape, self._where).angles(self._numbers(tokens), self._dtype)

        def run() -> Result:
            return self._ops.norm_rope_write(qkv, q_norm, k_norm, eps, cos, sin, cache, places), cache

        def exact() -> Result:
            norms = [None if norm is None else norm.double() for norm in (q_norm, k_norm)]
            into, angles = cache.double(), (cos.double(), sin.double())
            return reference.norm_rope_write(qkv.double(), norms[0], norms[1], eps, *angles, into, places), into

        return Case("norm_rope_write", {"tokens": tokens}, run, exact, 2 * qkv.nbytes + cos.nbytes + sin.nbytes)

    def choose(self, rows: int, kind: str) -> Case:
        """`greedy`, `top-k and top-p`, or `masked`, where a mask allows half of the tokens."""
        size, numbers, filtered = self._shape.vocab_size, self._numbers(rows), kind == "top-k and top-p"
        logits = 3 * torch.randn(rows, size, device=self._where)
        given = {
            "temperatures": torch.full((rows,), 0.0 if kind == "greedy" else 0.8, device=self._where),
            "top_k": torch.full((rows,), 50 if filtered else 0, device=self._where),
            "top_p": torch.full((rows,), 0.95 if filtered else 1.0, device=self._where),
            "min_p": torch.zeros(rows, device=self._where),
            "seeds": numbers,
            "positions": numbers,
            "mask_rows": numbers,
        }
        words = torch.randint(-(2**31), 2**31, (rows, -(-size // 32)), dtype=torch.int32, device=self._where)
        bitmasks = words if kind == "masked" else None
        run = partial(self._ops.choose, logits, bitmasks=bitmasks, **given)
        exact = partial(sampling.choose, logits.double(), bitmasks=bitmasks, **given)
        read = logits.nbytes + (0 if bitmasks is None else bitmasks.nbytes)
        return Case("choose", {"rows": rows, "vocabulary": size, "kind": kind}, run, exact, read, error=share_of_others)

    def copy_pages(self, pages: int) -> Case:
        """Copies within a cache, in all layers, as forks begin with them."""
        shape = self._shape
        cache = self._noise(shape.num_layers, 2, 2 * pages, PAGE, shape.num_kv_heads, shape.head_dim)
        sources, targets = torch.randperm(pages, device=self._where), self._numbers(2 * pages)[pages:]

        def run() -> Result:
            self._ops.copy_pages(cache, cache, sources, targets)
            return cache[:, :, pages:]

        named: dict[str, int | str] = {"pages": pages, "layers": shape.num_layers}
        return Case("copy_pages", named, run, lambda: cache[:, :, sources], cache.nbytes)

    def _noise(self, *size: int) -> Tensor:
        return torch.randn(size, dtype=self._dtype, device=self._where)

    def _numbers(self, end: int) -> Tensor:
        return torch.arange(end, device=self._where)

    def _contexts(self, batch: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
        """The cache of a layer, the page table of rows that fill it in random order, and `[batch, context]` places."""
        pages = -(-context // PAGE)
        cache = self._noise(2, batch * pages, PAGE, self._shape.num_kv_heads, self._shape.head_dim)
        table = torch.randperm(batch * pages, device=self._where).view(batch, pages)
        positions = self._numbers(context)
        return cache, table, table[:, positions // PAGE] * PAGE + positions % PAGE


def exact_attention(q: Tensor, cache: Tensor, places: Tensor) -> Tensor:
    """Attention in float64: `[B, H, D]` queries, one a row, against contexts at `[B, N]`; or those of all N tokens of a
    single row."""
    rows = []
    for queries, context in zip(q.view(len(places), -1, *q.shape[1:]), places, strict=True):
        keys, values = (side[context].double().transpose(0, 1)[None] for side in cache.flatten(1, 2))
        wide, causal = queries.double().transpose(0, 1)[None], len(queries) > 1
        rows.append(F.scaled_dot_product_attention(wide, keys, values, is_causal=causal, enable_gqa=True)[0])
    return torch.cat(rows, 1).transpose(0, 1)
