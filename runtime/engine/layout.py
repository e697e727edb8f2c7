"""The tokens of a step in the order in which they are computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from treadle.runtime.engine.device import Device
from treadle.runtime.engine.state import DeviceState
from treadle.scheduler import Row


class Layout:
    """The rows of a step, one after the other; those with one token come first::

        token       0 1 2 3 | 4 5 6 7 8 | 9 10 11
        row         0 1 2 3 | 4         | 5
                    decode    prefill     prefill

    Attributes:
        num_single: Rows with one token.
        slots: `[T]`, the slot of each token's row.
        positions: `[T]`, in their calls.
        token_ids: `[T]`.
        places: `[T]`, where their keys and values go.
        last: `[R]`, the last token of each row.
        sampling: The last tokens of those rows that sample.
    """

    def __init__(self, state: DeviceState, rows: Sequence[Row], device: Device) -> None:
        counts = [row.count for row in rows]
        self.num_single = next((i for i, count in enumerate(counts) if count > 1), len(rows))
        slots = np.repeat([row.slot for row in rows], counts)
        positions = np.concatenate([np.arange(row.start, row.end) for row in rows])
        self.slots, self.positions = device.send(torch.from_numpy(np.stack((slots, positions))))
        self.token_ids = state.token_pool[self.slots, self.positions]
        self.places = state.places(self.slots, self.positions)
        last = np.cumsum(counts) - 1
        self.last = device.send(torch.from_numpy(last))
        samples = [row.sample for row in rows]
        self.sampling = self.last if all(samples) else device.send(torch.from_numpy(last[samples]))
