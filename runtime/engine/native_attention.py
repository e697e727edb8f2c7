"""How the rows of a step look at their pages where all layers are one operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treadle.kernels.native import SPAN
from treadle.kernels.native_layers import NativeLayers
from treadle.runtime.engine.layout import Layout
from treadle.runtime.engine.sharing import SharedPrefix
from treadle.runtime.engine.state import DeviceState
from treadle.scheduler import Row

MOST_TOKENS = 128
"""Of a prompt, in one task: enough that fetching the context for them costs little, and few enough that there is work
for every thread."""
MOST_ROWS = 16
"""Of a group that shares a prefix, in one task: the same holds. Fewer, where threads would have nothing to do."""


class NativeAttention:
    """A task for each row with one token or group of such rows that share a prefix, and several for a longer row."""

    def __init__(
        self,
        state: DeviceState,
        rows: Sequence[Row],
        layout: Layout,
        window: int | None,
        sharing: Sequence[SharedPrefix] = (),
    ) -> None:
        self._state = state
        self._window = window
        self.positions, self.places = layout.positions, layout.places
        assert window is None or not sharing
        runs, tasks = work(rows, sharing, state.page_size, torch.get_num_threads())
        self._runs = torch.tensor(runs, dtype=torch.int32)
        self._tasks = torch.tensor(tasks, dtype=torch.int32)

    def run(self, layers: NativeLayers, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        state = self._state
        return layers(x, angles, state.kv, self.places, state.page_table, self._runs, self._tasks, self._window)


def rows_of_task(num_rows: int, num_threads: int) -> int:
    """How many rows of a group are a task: as many tasks as threads, or more, but none of a single row."""
    num_tasks = max(-(-num_rows // MOST_ROWS), min(num_threads, num_rows // 2))
    return -(-num_rows // num_tasks)


def work(
    rows: Sequence[Row], sharing: Sequence[SharedPrefix], page_size: int, num_threads: int
) -> tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int]]]:
    """Runs and tasks as `Contexts.of` takes them, the largest tasks first. Rows that share are next to each other."""
    runs: list[tuple[int, int, int, int]] = []
    tasks: list[tuple[int, int, int]] = []
    costs: list[int] = []
    shared = {index: group for group in sharing for index in group.rows}
    token = 0
    for index, row in enumerate(rows):
        group = shared.get(index)
        for start in range(row.start, row.end, MOST_TOKENS):
            count = min(MOST_TOKENS, row.end - start)
            if group is not None and (index - group.rows[0]) % rows_of_task(len(group.rows), num_threads):
                first, num_runs, tokens = tasks[-1]
                tasks[-1] = first, num_runs + 1, tokens
            else:
                tasks.append((len(runs), 1, group.num_pages * page_size // SPAN * SPAN if group is not None else 0))
                costs.append(0)
            runs.append((token, count, row.slot, start))
            costs[-1] += count * (start + count)
            token += count
    order = sorted(range(len(tasks)), key=costs.__getitem__, reverse=True)
    return runs, [tasks[i] for i in order]
