"""Decode steps as CUDA graphs: a step's hundreds of launches become one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treadle.kernels.ops import PagedKernels
from treadle.runtime.engine.device import Device
from treadle.runtime.engine.layout import lay_out_padded
from treadle.runtime.engine.paged import PagedAttention, group_table
from treadle.runtime.engine.sharing import SharedPrefix
from treadle.runtime.engine.state import DeviceState
from treadle.runtime.models.decoder import Decoder
from treadle.scheduler import Row

PADDING = -1


class DecodeStep:
    """A step of a fixed number of rows that have one token each and sample; fewer rows leave the rest as padding.

    With groups, of which there may be fewer too, rows that share a prefix read it once.
    """

    def __init__(
        self, decoder: Decoder, state: DeviceState, kernels: PagedKernels, num_rows: int, num_groups: int = 0
    ) -> None:
        self._decoder = decoder
        self._state = state
        self._kernels = kernels
        self.inputs = torch.tensor([[0], [PADDING]], device=decoder.device).repeat(1, num_rows)
        self.groups = torch.zeros(num_groups, 3, dtype=torch.int32, device=decoder.device) if num_groups else None

    def compute(self) -> tuple[Tensor, Tensor]:
        """Logits `[num_rows, V]`, and whether the KV of each row is finite, from what is in `inputs`."""
        slots, positions = self.inputs
        layout = lay_out_padded(slots, positions, self._state)
        window = self._decoder.config.sliding_window
        attention = PagedAttention(self._state, self._kernels, layout, window, groups=self.groups)
        logits = self._decoder.forward(layout.token_ids, attention, layout.sampling)
        return logits, self._state.finite(layout.places.clamp(min=0))


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    step: DecodeStep
    logits: Tensor
    finite: Tensor


class DecodeGraphs:
    """Graphs of decode steps, each captured when a step of its size first comes. They share one pool of memory.

    Steps in which rows share prefixes have graphs of their own.
    """

    def __init__(
        self, decoder: Decoder, state: DeviceState, kernels: PagedKernels, device: Device, max_rows: int
    ) -> None:
        self._decoder = decoder
        self._state = state
        self._kernels = kernels
        self._device = device
        self._sizes = graph_sizes(max_rows)
        self._graphs: dict[tuple[int, int], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def forward(self, rows: Sequence[Row], sharing: Sequence[SharedPrefix]) -> tuple[Tensor, Tensor]:
        """Logits `[R, V]` and finiteness `[R]` of rows that have one token each and sample.

        Rows that share a prefix are next to each other.
        """
        size = self._sizes[bisect_left(self._sizes, len(rows))]
        num_groups = size // 2 if sharing else 0
        captured = self._graphs.get((size, num_groups)) or self._capture(size, num_groups)
        missing = size - len(rows)
        inputs = [[row.slot for row in rows] + [0] * missing, [row.start for row in rows] + [PADDING] * missing]
        captured.step.inputs.copy_(self._device.send(torch.tensor(inputs)))
        if captured.step.groups is not None:
            table = group_table(sharing, num_groups, self._state.page_size)
            captured.step.groups.copy_(self._device.send(table))
        captured.graph.replay()
        # Copies: the next replay writes the same memory, and these may not have been sampled by then.
        return captured.logits[: len(rows)].clone(), captured.finite[: len(rows)].clone()

    def _capture(self, size: int, num_groups: int) -> _Captured:
        step = DecodeStep(self._decoder, self._state, self._kernels, size, num_groups)
        step.compute()  # compiles what is not compiled yet, which cannot be done while capturing
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits, finite = step.compute()
        captured = self._graphs[size, num_groups] = _Captured(graph, step, logits, finite)
        return captured


def graph_sizes(max_rows: int) -> list[int]:
    """Numbers of rows to capture: 1, 2, 4, then every eighth, and the most. At most 7 rows of a step are padding."""
    return sorted({size for size in (1, 2, 4, *range(8, max_rows, 8)) if size < max_rows} | {max_rows})
