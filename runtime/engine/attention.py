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

    def places(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Where the tokens at positions of slots have their KV: `page * page_size + offset`. The two are broadcast."""
        return self.page_table[slots, positions // self.page_size] * self.page_size + positions % self.page_size


def _arena(model: ModelConfig, dtype: torch.dtype, num_pages: int, page_size: int) -> Tensor:
    """Pages that hold anything. Memory is not touched before it is used: a large pool costs nothing until it fills."""
    return torch.empty(model.num_layers, 2, num_pages, page_size, model.num_kv_heads, model.head_dim, dtype=dtype)


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Rows with one token each and contexts of similar length."""

    tokens: slice | Tensor
    places: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class _PrefillRow:
    tokens: slice
    places: Tensor
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
        self._places = state.places(slots, self.positions)
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
            return ops.decode_attention(q, cache, group.places, group.mask)
        out = torch.empty_like(q)
        for group in self._groups:
            out[group.tokens] = ops.decode_attention(q[group.tokens], cache, group.places, group.mask)
        for row in self._prefills:
            out[row.tokens] = ops.prefill_attention(q[row.tokens], cache, row.places, row.mask)
        return out

    def finite(self) -> Tensor:
        """Whether each row's KV is finite, `[R]`. A token's that is not can spoil tokens before it, if at all, only in
        the layers after, where it spoils the row's last token as well: that one's in the last layer tells of all."""
        last = self._state.kv[-1].flatten(1, 2)[:, self._places[self.ends - 1]]
        return last.isfinite().all((0, 2, 3))

    def _group(self, rows: Sequence[Row]) -> list[_DecodeGroup]:
        """Groups rows whose contexts have the same power of two of pages: at most half of a gather is padding."""
        by_size: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            num_pages = -(-row.end // self._state.page_size)
            by_size.setdefault((num_pages - 1).bit_length(), []).append(index)
        groups = []
        for members in by_size.values():
            lengths = torch.tensor([[rows[i].end] for i in members])
            slots = torch.tensor([[rows[i].slot] for i in members])
            positions = torch.arange(int(lengths.max()))
            # What lies behind a row's end may be another call's: there its own last place is repeated.
            places = self._state.places(slots, positions.minimum(lengths - 1))
            tokens = slice(0, len(rows)) if len(members) == len(rows) else torch.tensor(members)
            groups.append(_DecodeGroup(tokens, places, self._decode_mask(lengths, positions)))
        return groups

    def _decode_mask(self, lengths: Tensor, positions: Tensor) -> Tensor | None:
        if self._window is None and bool((lengths == len(positions)).all()):
            return None
        return self._mask(positions, lengths - 1)[:, None, None]

    def _prefill(self, row: Row, end: int) -> _PrefillRow:
        positions = torch.arange(row.end)
        mask = None
        if row.start > 0 or (self._window is not None and row.end > self._window):
            mask = self._mask(positions, positions[row.start :, None])
        return _PrefillRow(slice(end - row.count, end), self._state.places(torch.tensor(row.slot), positions), mask)

    def _mask(self, keys: Tensor, queries: Tensor) -> Tensor:
        """Zero where a query position may look at a key position, minus infinity elsewhere."""
        hidden = keys > queries
        if self._window is not None:
            hidden |= keys <= queries - self._window
        return torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, float("-inf"))
