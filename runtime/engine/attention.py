"""Pages on the device: the KV arena, the tables of the slots, and how the rows of a step look at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from treadle.kernels import reference as ops
from treadle.runtime.models.config import ModelConfig
from treadle.scheduler import Row, StepPlan


class DeviceState:
    """What the engine keeps between steps: KV pages, and for each slot its tokens and its page table.

    ::

        kv          [layers, 2, pages, page_size, kv_heads, head_dim]
        host_kv     [layers, 2, host_pages, ...]   what was saved of pages that went to others
        token_pool  [slots, max_context]      known and sampled tokens; a sampled token is read from here by the next
        page_table  [slots, max_pages]        step, so it need not come to the host in between
    """

    def __init__(
        self,
        model: ModelConfig,
        dtype: torch.dtype,
        num_pages: int,
        page_size: int,
        num_slots: int,
        max_context: int,
        host_pages: int = 0,
    ) -> None:
        self.page_size = page_size
        self.kv = _arena(model, dtype, num_pages, page_size)
        self.host_kv = _arena(model, dtype, host_pages, page_size)
        self.token_pool = torch.zeros(num_slots, max_context, dtype=torch.int64)
        self.page_table = torch.zeros(num_slots, -(-max_context // page_size), dtype=torch.int64)

    def write(self, plan: StepPlan) -> None:
        """Carries out all of a plan but its rows.

        ::

            kv       | save | copy | tables | load | rows ...      No row reads what is loaded in its own step, so a
            host_kv  | <--  |      |        |  --> |               device that copies beside computing may load later.
        """
        if plan.saves:
            ops.copy_pages(self.kv, self.host_kv, *torch.tensor(plan.saves).unbind(1))
        if plan.copies:
            ops.copy_pages(self.kv, self.kv, *torch.tensor(plan.copies).unbind(1))
        for tokens in plan.token_writes:
            end = tokens.position + len(tokens.token_ids)
            self.token_pool[tokens.slot, tokens.position : end] = torch.frombuffer(tokens.token_ids, dtype=torch.int32)
        for entry in plan.page_writes:
            self.page_table[entry.slot, entry.index : entry.index + len(entry.pages)] = torch.tensor(entry.pages)
        if plan.loads:
            ops.copy_pages(self.host_kv, self.kv, *torch.tensor(plan.loads).unbind(1))

    def scrub(self, row: Row) -> None:
        """Overwrites what a row computed with zeros, so that its NaNs do not outlive it in a reused page."""
        positions = torch.arange(row.start, row.end)
        pages = self.page_table[row.slot, positions // self.page_size]
        self.kv[:, :, pages, positions % self.page_size] = 0


def _arena(model: ModelConfig, dtype: torch.dtype, num_pages: int, page_size: int) -> Tensor:
    """Pages of zeros, `[layers, 2, pages, page_size, kv_heads, head_dim]`.

    numpy's zeros are not touched before they are used, so a large pool costs nothing until it fills. They must be
    zeros: attention reads the unwritten end of a page and multiplies it by zero, which garbage may survive.
    """
    shape = (model.num_layers, 2, num_pages, page_size, model.num_kv_heads, model.head_dim)
    return torch.from_numpy(np.zeros(shape, np.uint16 if dtype.itemsize == 2 else np.uint32)).view(dtype)


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Rows with one token each and contexts of similar length."""

    tokens: slice | Tensor
    pages: Tensor
    length: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class _PrefillRow:
    tokens: slice
    pages: Tensor
    start: int
    mask: Tensor | None


class PagedAttention:
    """The rows of a step, laid out for the decoder::

    token       0 1 2 3 | 4 5 6 7 8 | 9 10 11
    row         0 1 2 3 | 4         | 5          rows with one token first: they attend together,
                decode    prefill     prefill    by length; each longer row attends alone
    """

    def __init__(
        self, state: DeviceState, rows: Sequence[Row], dtype: torch.dtype, sliding_window: int | None = None
    ) -> None:
        self._state = state
        self._dtype = dtype
        self._window = sliding_window
        counts = [row.count for row in rows]
        self.ends = np.cumsum(counts)
        slots = torch.from_numpy(np.repeat([row.slot for row in rows], counts))
        self.positions = torch.from_numpy(np.concatenate([np.arange(row.start, row.end) for row in rows]))
        self.token_ids = state.token_pool[slots, self.positions]
        pages = state.page_table[slots, self.positions // state.page_size]
        self._places = pages * state.page_size + self.positions % state.page_size
        num_single = next((i for i, row in enumerate(rows) if row.count > 1), len(rows))
        self._groups = self._group(rows[:num_single])
        self._prefills = [
            self._prefill(row, int(end)) for row, end in zip(rows[num_single:], self.ends[num_single:], strict=True)
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self._state.kv[layer]
        ops.write_kv(cache, k, v, self._places)
        if len(self._groups) == 1 and not self._prefills:
            group = self._groups[0]
            return ops.decode_attention(q, cache, group.pages, group.length, group.mask)
        out = torch.empty_like(q)
        for group in self._groups:
            out[group.tokens] = ops.decode_attention(q[group.tokens], cache, group.pages, group.length, group.mask)
        for row in self._prefills:
            out[row.tokens] = ops.prefill_attention(q[row.tokens], cache, row.pages, row.start, row.mask)
        return out

    def _group(self, rows: Sequence[Row]) -> list[_DecodeGroup]:
        """Groups rows whose contexts have the same power of two of pages: at most half of a gather is padding."""
        by_size: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            num_pages = -(-row.end // self._state.page_size)
            by_size.setdefault((num_pages - 1).bit_length(), []).append(index)
        groups = []
        for members in by_size.values():
            lengths = torch.tensor([rows[i].end for i in members])
            length = int(lengths.max())
            slots = torch.tensor([rows[i].slot for i in members])
            pages = self._state.page_table[slots, : -(-length // self._state.page_size)]
            # Entries behind a row's own pages are left from earlier calls: valid pages, behind the mask.
            tokens = slice(0, len(rows)) if len(members) == len(rows) else torch.tensor(members)
            groups.append(_DecodeGroup(tokens, pages, length, self._decode_mask(lengths, length)))
        return groups

    def _decode_mask(self, lengths: Tensor, length: int) -> Tensor | None:
        if self._window is None and bool((lengths == length).all()):
            return None
        return self._mask(torch.arange(length), lengths[:, None] - 1)[:, None, None]

    def _prefill(self, row: Row, end: int) -> _PrefillRow:
        pages = self._state.page_table[row.slot, : -(-row.end // self._state.page_size)]
        mask = None
        if row.start > 0 or (self._window is not None and row.end > self._window):
            mask = self._mask(torch.arange(row.end), torch.arange(row.start, row.end)[:, None])
        return _PrefillRow(slice(end - row.count, end), pages, row.start, mask)

    def _mask(self, keys: Tensor, queries: Tensor) -> Tensor:
        """Zero where a query position may look at a key position, minus infinity elsewhere."""
        hidden = keys > queries
        if self._window is not None:
            hidden |= keys <= queries - self._window
        return torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, float("-inf"))
