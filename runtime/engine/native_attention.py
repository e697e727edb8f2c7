"""How the rows of a step look at their pages where one operation computes any rows (`Native.attention`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treadle.kernels.native_layers import NativeLayers
from treadle.kernels.ops import Attend
from treadle.runtime.engine.layout import Layout
from treadle.runtime.engine.sharing import SharedPrefix
from treadle.runtime.engine.state import DeviceState
from treadle.scheduler import Row

MOST_TOKENS = 64
"""Of a prompt, in one task: enough that fetching the context for them costs little, and few enough that there is work
for every thread."""


class NativeAttention:
    """A task for each row with one token or group of such rows that share a prefix, and several for a longer row."""

    def __init__(
        self,
        state: DeviceState,
        attend: Attend,
        rows: Sequence[Row],
        layout: Layout,
        window: int | None,
        sharing: Sequence[SharedPrefix] = (),
    ) -> None:
        self._state = state
        self._attend = attend
        self._window = window
        self.positions, self.places = layout.positions, layout.places
        runs, tasks = _work(rows, sharing, state.page_size)
        self._runs = torch.tensor(runs, dtype=torch.int32)
        self._tasks = torch.tensor(tasks, dtype=torch.int32)

    def cache(self, layer: int) -> Tensor:
        return self._state.kv[layer]

    def run(self, layers: NativeLayers, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        state = self._state
        return layers(x, angles, state.kv, self.places, state.page_table, self._runs, self._tasks, self._window)

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        return self._attend(q, self.cache(layer), self._state.page_table, self._runs, self._tasks, self._window)


def _work(
    rows: Sequence[Row], sharing: Sequence[SharedPrefix], page_size: int
) -> tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int]]]:
    """Runs and tasks as `Native.attention` takes them, the largest tasks first."""
    runs: list[tuple[int, int, int, int]] = []
    tasks: list[tuple[int, int, int]] = []
    costs: list[int] = []
    shared = {group.rows[0]: group for group in sharing}
    token, left = 0, 0
    for index, row in enumerate(rows):
        for start in range(row.start, row.end, MOST_TOKENS):
            count = min(MOST_TOKENS, row.end - start)
            if not left:
                group = shared.get(index)
                left = len(group.rows) if group is not None else 1
                tasks.append((len(runs), left, group.num_pages * page_size if group is not None else 0))
                costs.append(0)
            runs.append((token, count, row.slot, start))
            costs[-1] += count * (start + count)
            token += count
            left -= 1
    order = sorted(range(len(tasks)), key=costs.__getitem__, reverse=True)
    return runs, [tasks[i] for i in order]
