"""How the rows of a step look at their pages where kernels read page tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from treadle.kernels.ops import PagedKernels
from treadle.runtime.engine.device import Device
from treadle.runtime.engine.layout import Layout
from treadle.runtime.engine.sharing import SharedPrefix
from treadle.runtime.engine.state import DeviceState
from treadle.scheduler import Row


@dataclass(frozen=True, slots=True)
class _Prefills:
    """Rows with more than one token: slots `[R]`, where their tokens begin `[R + 1]`, and their contexts `[R]`."""

    slots: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int


class PagedAttention:
    """Rows with one token go through one kernel, those with more, which come last, through another.

    What the first needs is on the device, and its size depends on nothing but the number of rows, so that a step of
    such rows can be captured in a graph. A token at position -1 is padding: nothing is written or read for it.

    Args:
        groups: int32 `[M, 3]`, rows with one token that share a prefix: the first, how many, and the tokens shared.
    """

    def __init__(
        self,
        state: DeviceState,
        kernels: PagedKernels,
        layout: Layout,
        window: int | None,
        *,
        groups: Tensor | None = None,
        prefills: _Prefills | None = None,
    ) -> None:
        self._state = state
        self._kernels = kernels
        self._window = window
        self.positions, self.places = layout.positions, layout.places
        self._groups = groups
        self._prefills = prefills
        self._num_single = layout.num_single
        self._slots = layout.slots[: layout.num_single]
        self._lengths = (layout.positions[: layout.num_single] + 1).to(torch.int32)
        kv_heads = state.kv.shape[4]
        self._num_splits = kernels.num_splits(max(layout.num_single, 1), kv_heads)
        self._shared_splits = kernels.num_splits(len(groups), kv_heads) if groups is not None else 0

    @classmethod
    def of(
        cls,
        state: DeviceState,
        kernels: PagedKernels,
        rows: Sequence[Row],
        layout: Layout,
        device: Device,
        window: int | None,
        sharing: Sequence[SharedPrefix] = (),
    ) -> PagedAttention:
        """The attention of any rows, of which groups that share are next to each other."""
        long = rows[layout.num_single :]
        groups = device.send(group_table(sharing, len(sharing), state.page_size)) if sharing else None
        if not long:
            return cls(state, kernels, layout, window, groups=groups)
        starts = accumulate((row.count for row in long), initial=0)
        numbers = [*starts, *(row.slot for row in long), *(row.end for row in long)]
        sent = device.send(torch.tensor(numbers, dtype=torch.int32))
        begins, slots, lengths = torch.split(sent, [len(long) + 1, len(long), len(long)])
        prefills = _Prefills(slots, begins, lengths, max(row.count for row in long))
        return cls(state, kernels, layout, window, groups=groups, prefills=prefills)

    def cache(self, layer: int) -> Tensor:
        return self._state.kv[layer]

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        prefills, single = self._prefills, self._num_single
        if prefills is None:
            return self._decode(layer, q)
        out = torch.empty_like(q)
        if single:
            out[:single] = self._decode(layer, q[:single])
        out[single:] = self._kernels.prefill(
            q[single:],
            self.cache(layer),
            self._state.page_table,
            prefills.slots,
            prefills.starts,
            prefills.lengths,
            max_new=prefills.longest,
            window=self._window,
        )
        return out

    def _decode(self, layer: int, q: Tensor) -> Tensor:
        context = q, self.cache(layer), self._state.page_table, self._slots, self._lengths
        if self._groups is None:
            return self._kernels.decode(*context, num_splits=self._num_splits, window=self._window)
        return self._kernels.shared(
            *context, self._groups, num_splits=self._num_splits, shared_splits=self._shared_splits
        )


def group_table(sharing: Sequence[SharedPrefix], size: int, page_size: int) -> Tensor:
    """int32 `[size, 3]` of groups whose rows follow each other: first row, number of rows, tokens shared."""
    table = [[group.rows[0], len(group.rows), group.num_pages * page_size] for group in sharing]
    return torch.tensor(table + [[0, 0, 0]] * (size - len(table)), dtype=torch.int32).view(size, 3)
