"""Paged contexts surrounded by NaN, and attention to them by the formula, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Paged:
    """Contexts in a cache whose pages lie in random order, and whose page table names pages of NaN behind each."""

    cache: Tensor
    scales: Tensor | None
    page_table: Tensor
    slots: Tensor
    lengths: Tensor

    def attention(self, row: int, q: Tensor, position: int, window: int | None = None) -> Tensor:
        """What the `[H, D]` query of a row's token gets: all in float64, one token after the other."""
        first = 0 if window is None else max(position + 1 - window, 0)
        tokens = torch.arange(first, position + 1)
        page, offset = self.page_table[self.slots[row], tokens // self.cache.shape[2]], tokens % self.cache.shape[2]
        keys, values = self.cache[:, page, offset].double()
        if self.scales is not None:
            key_scales, value_scales = self.scales[:, page, offset].double()
            keys, values = keys * key_scales[..., None], values * value_scales[..., None]
        group = q.shape[0] // keys.shape[1]
        keys, values = (side.repeat_interleave(group, 1) for side in (keys, values))
        scores = torch.einsum("hd,thd->ht", q.double(), keys) / math.sqrt(q.shape[1])
        return torch.einsum("ht,thd->hd", scores.softmax(-1), values).to(q.dtype)


def paged_contexts(lengths, *, page=16, kv_heads=2, size=64, dtype=torch.float32, shared=(), seed=0) -> Paged:
    """Random contexts of these lengths; a length of 0 has no page.

    Args:
        dtype: float32 or float16; int8 and e4m3 come with scales.
        shared: `(first row, rows, tokens)` of rows whose contexts begin with the same pages.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // page) for length in lengths]
    num_pages = sum(counts) + 3
    order = torch.randperm(num_pages, generator=generator)
    nowhere = order[-1]
    page_table = nowhere.expand(len(lengths) + 2, max(counts) + 8).clone()
    slots = torch.randperm(len(page_table), generator=generator)[: len(lengths)]
    for slot, pages in zip(slots, order.split([*counts, 3]), strict=False):
        page_table[slot, : len(pages)] = pages
    for first, rows, tokens in shared:
        page_table[slots[first : first + rows], : tokens // page] = page_table[slots[first], : tokens // page]
    cache = torch.full((2, num_pages, page, kv_heads, size), math.nan).to(dtype)
    scales = torch.full(cache.shape[:4], math.nan) if cache.element_size() == 1 else None
    for slot, length in zip(slots, lengths, strict=True):
        tokens = torch.arange(length)
        places = page_table[slot, tokens // page], tokens % page
        content = torch.randn(2, length, kv_heads, size, generator=generator)
        cache[:, *places] = (content * 40 if dtype == torch.int8 else content).to(dtype)
        if scales is not None:
            scales[:, *places] = torch.rand(2, length, kv_heads, generator=generator) * (
                0.05 if dtype == torch.int8 else 2
            )
    return Paged(cache, scales, page_table, slots, torch.tensor(lengths, dtype=torch.int32))


def query_type(dtype: torch.dtype) -> torch.dtype:
    """The type of the queries against a cache of this type."""
    return dtype if dtype in (torch.float32, torch.float16) else torch.float16


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 4e-3}
