"""The tokens of a step in the order in which they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from treadle.runtime.engine.device import Device
from treadle.runtime.engine.state import DeviceState
from treadle.scheduler import Row


@dataclass(frozen=True, slots=True)
class Layout:
    """The rows of a step, one after the other; those with one token come first::

        token       0 1 2 3 | 4 5 6 7 8 | 9 10 11
        row         0 1 2 3 | 4         | 5
                    decode    prefill     prefill

    Attributes:
        num_single: Rows with one token.
        slots: `[T]`, the slot of each token's row.
        positions: `[T]`, in their calls; -1 is padding.
        token_ids: `[T]`.
        places: `[T]`, where their keys and values go; -1 is padding.
        last: `[R]`, the last token of each row.
        sampling: The last tokens of those rows that sample.
    """

    num_single: int
    slots: Tensor
    positions: Tensor
    token_ids: Tensor
    places: Tensor
    last: Tensor
    sampling: Tensor


def lay_out(rows: Sequence[Row], state: DeviceState, device: Device) -> Layout:
    """The layout of any rows."""
    counts = [row.count for row in rows]
    num_single = next((i for i, count in enumerate(counts) if count > 1), len(rows))
    ends = np.cumsum(counts) - 1
    rest = [row.end - 1 for row in rows] - ends  # from a token's place in the step to its position
    tokens = np.repeat([[row.slot for row in rows], rest], counts, axis=1)
    tokens[1] += np.arange(len(tokens[1]))
    slots, sent = device.send(torch.from_numpy(tokens))
    samples = [row.sample for row in rows]
    last = device.send(torch.from_numpy(ends))
    sampling = last if all(samples) else device.send(torch.from_numpy(ends[samples]))
    return Layout(num_single, slots, sent, state.token_pool[slots, sent], state.places(slots, sent), last, sampling)


def lay_out_padded(slots: Tensor, positions: Tensor, state: DeviceState) -> Layout:
    """The layout of rows that have one token each and sample, where a position of -1 is padding.

    It is computed on the device from `[R]` tensors alone, so that it can be part of a captured graph.
    """
    known = positions.clamp(min=0)
    places = torch.where(positions < 0, -1, state.places(slots, known))
    every = torch.arange(len(slots), device=slots.device)
    return Layout(len(slots), slots, positions, state.token_pool[slots, known], places, every, every)
