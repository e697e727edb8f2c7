"""How the rows of a step look at their pages where no kernel reads page tables: contexts are gathered first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from treadle.kernels import reference as ops
from treadle.runtime.engine.layout import Layout
from treadle.runtime.engine.state import DeviceState
from treadle.scheduler import Row


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


class GatheredAttention:
    """Rows with one token attend together, by the length of their contexts; each longer row attends alone."""

    def __init__(
        self, state: DeviceState, rows: Sequence[Row], layout: Layout, dtype: torch.dtype, window: int | None
    ) -> None:
        self._state = state
        self._dtype = dtype
        self._window = window
        self.positions, self.places = layout.positions, layout.places
        num_single = layout.num_single
        self._groups = self._group(rows[:num_single])
        ends = np.cumsum([row.count for row in rows])
        self._prefills = [
            self._prefill(row, int(end)) for row, end in zip(rows[num_single:], ends[num_single:], strict=True)
        ]

    def cache(self, layer: int) -> Tensor:
        return self._state.kv[layer]

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        cache = self.cache(layer)
        if len(self._groups) == 1 and not self._prefills:
            group = self._groups[0]
            return ops.decode_attention(q, cache, group.places, group.mask)
        out = torch.empty_like(q)
        for group in self._groups:
            out[group.tokens] = ops.decode_attention(q[group.tokens], cache, group.places, group.mask)
        for row in self._prefills:
            out[row.tokens] = ops.prefill_attention(q[row.tokens], cache, row.places, row.mask)
        return out

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
