"""What lies on the device between steps: KV pages, and of each slot its tokens and its page table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from treadle.runtime.engine.arena import Arena
from treadle.runtime.engine.device import Device
from treadle.runtime.models.config import ModelConfig
from treadle.scheduler import StepPlan


class DeviceState:
    """What the engine keeps between steps.

    ::

        kv          [layers, 2, pages, page_size, kv_heads, head_dim]
        host_kv     [layers, 2, host_pages, ...]   in the host's memory: what was saved of pages that went to others
        token_pool  [slots, max_context]      known and sampled tokens; a sampled token is read from here by the next
        page_table  [slots, max_pages]        step, so it need not come to the host in between
        tables      page_table, as the host knows it
    """

    def __init__(
        self,
        model: ModelConfig,
        dtype: torch.dtype,
        num_pages: int,
        page_size: int,
        num_slots: int,
        max_context: int,
        device: Device,
        host_pages: int = 0,
    ) -> None:
        page = page_size, model.num_kv_heads, model.head_dim
        self.page_size = page_size
        self._device = device
        self._loading: tuple[Tensor, Tensor] | None = None
        where = device.torch_device
        self._arena = Arena(model.num_layers, num_pages, page, dtype) if where.type == "cpu" else None
        if self._arena is not None:
            self.kv = self._arena.kv
        else:
            self.kv = torch.empty(model.num_layers, 2, num_pages, *page, dtype=dtype, device=where)
        self.host_kv = device.host_memory((model.num_layers, 2, host_pages, *page), dtype)
        self.token_pool = torch.zeros(num_slots, max_context, dtype=torch.int64, device=where)
        self.tables = np.zeros((num_slots, -(-max_context // page_size)), dtype=np.int64)
        self.page_table = torch.from_numpy(self.tables).to(where)

    @property
    def page_bytes(self) -> int:
        """What one page of KV takes up, in all layers."""
        return self.kv[:, :, 0].numel() * self.kv.element_size()

    def touch_ahead(self, num_used: int) -> bool:
        """`Arena.touch_ahead`. On a GPU there is nothing to touch: its memory is there from the beginning."""
        return self._arena is not None and self._arena.touch_ahead(num_used)

    def write(self, plan: StepPlan) -> None:
        """Carries out all of a plan but its rows.

        ::

            kv       | save | copy | tables | rows ...           No row reads what is loaded in its own step: a device
            host_kv  | <--  |      |        | load --> ...       that copies beside computing loads meanwhile.
        """
        self._device.join_copies()
        copy_pages = self._device.ops.copy_pages
        if plan.saves:
            copy_pages(self.kv, self.host_kv, *self._pairs(plan.saves))
        if plan.copies:
            copy_pages(self.kv, self.kv, *self._pairs(plan.copies))
        _scatter(self.token_pool, ((w.slot, w.position, w.token_ids) for w in plan.token_writes), self._device)
        for entry in plan.page_writes:
            self.tables[entry.slot, entry.index : entry.index + len(entry.pages)] = entry.pages
        if not self.page_table.is_cpu:
            _scatter(self.page_table, ((w.slot, w.index, w.pages) for w in plan.page_writes), self._device)
        # Kept until they are waited for: memory given back could be written again while a copy still reads it.
        self._loading = self._pairs(plan.loads) if plan.loads else None
        if self._loading is not None:
            with self._device.copying():
                copy_pages(self.host_kv, self.kv, *self._loading)

    def _pairs(self, pairs: Iterable[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        sources, targets = self._device.send(torch.tensor(list(pairs)).t())
        return sources, targets

    def places(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Where the tokens at positions of slots have their KV: `page * page_size + offset`. The two are broadcast."""
        return self.page_table[slots, positions // self.page_size] * self.page_size + positions % self.page_size

    def finite(self, places: Tensor) -> Tensor:
        """Whether the KV of rows is finite, `[R]`, by the `[R]` places of their last tokens.

        A token whose KV is not can spoil tokens before it, if at all, only in the layers after, where it spoils the
        row's last token as well: that one's in the last layer tells of all.
        """
        rows = self.kv[-1].flatten(1, 2).flatten(2)[:, places]
        return (rows * 0).sum((0, 2)) == 0  # 0 times what is not finite is not a number; `isfinite` takes much longer


def _scatter(table: Tensor, writes: Iterable[tuple[int, int, Sequence[int]]], device: Device) -> None:
    """Puts runs of values into the rows of a table: `(row, column, values)`. No place is written twice."""
    runs = list(writes)
    if not runs:
        return
    counts = [len(values) for _, _, values in runs]
    rows = np.repeat([row for row, _, _ in runs], counts)
    columns = np.concatenate([np.arange(column, column + len(values)) for _, column, values in runs])
    entries = np.concatenate([np.asarray(values, dtype=np.int64) for _, _, values in runs])
    sent = device.send(torch.from_numpy(np.stack((rows, columns, entries))))
    table[sent[0], sent[1]] = sent[2]
