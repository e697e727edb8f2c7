"""Carries out the tensor part of a step: rows in, tokens out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from treadle.runtime.engine.attention import GatheredAttention
from treadle.runtime.engine.device import Device, Event
from treadle.runtime.engine.graphs import DecodeGraphs
from treadle.runtime.engine.layout import Layout, lay_out
from treadle.runtime.engine.native_attention import NativeAttention
from treadle.runtime.engine.paged import PagedAttention
from treadle.runtime.engine.sampler import Sampled, SampleRow, sample, token_logprob
from treadle.runtime.engine.sharing import SharedPrefix, find_sharing
from treadle.runtime.engine.state import DeviceState
from treadle.runtime.models.decoder import Attention, Decoder, LayersAttention
from treadle.scheduler import Row, SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class SamplingCall:
    """What sampling needs to know of a call."""

    params: SamplingParams
    num_prompt: int
    bitmask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Forward:
    """A launched forward pass. `logits` has a row for each of the `rows` that sample, in order.

    `finite`, `[len(rows)]`, says of each row whether its KV is.
    """

    rows: tuple[Row, ...]
    logits: Tensor
    finite: Tensor


@dataclass(frozen=True, slots=True)
class Launched:
    """Sampled tokens of those `rows` that sample, and which rows have finite KV, on their way to the host."""

    rows: tuple[Row, ...]
    sampled: Sampled
    finite: Tensor
    ready: Event


@dataclass(frozen=True, slots=True)
class RowToken:
    """What a row sampled; -1 if its logits, or the KV of a row that does not sample, were not finite."""

    row: Row
    token_id: int
    logprob: TokenLogprob | None


class Runner:
    """Owns the decoder and the device's state. It raises what the tensor operations raise, and changes nothing else."""

    def __init__(
        self,
        decoder: Decoder,
        state: DeviceState,
        device: Device,
        graphs: DecodeGraphs | None = None,
        *,
        cascade: bool = True,
    ) -> None:
        self.decoder = decoder
        self.state = state
        self.device = device
        self._graphs = graphs
        self._cascade = cascade

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row]) -> Forward:
        """Computes KV of the rows' tokens and logits of their last ones. Repeating it does no harm."""
        rows, sharing = self._side_by_side(rows)
        if self._graphs is not None and all(row.count == 1 and row.sample for row in rows):
            return Forward(tuple(rows), *self._graphs.forward(rows, sharing))
        layout = lay_out(rows, self.state, self.device)
        attention = self._attention(rows, layout, sharing)
        logits = self.decoder.forward(layout.token_ids, attention, layout.sampling)
        return Forward(tuple(rows), logits, self.state.finite(layout.places[layout.last]))

    def _side_by_side(self, rows: Sequence[Row]) -> tuple[Sequence[Row], list[SharedPrefix]]:
        """The rows with those next to each other that share a prefix, and those groups."""
        if not self._cascade or self.decoder.config.sliding_window is not None:
            return rows, []
        single = [row for row in rows if row.count == 1]
        found = find_sharing(single, self.state.tables, self.state.page_size)
        if not found:
            return rows, []
        ordered: list[Row] = []
        groups = []
        for group in found:
            places = range(len(ordered), len(ordered) + len(group.rows))
            groups.append(replace(group, rows=tuple(places)))
            ordered += [single[i] for i in group.rows]
        alone = set(range(len(single))).difference(*(group.rows for group in found))
        return [*ordered, *(single[i] for i in sorted(alone)), *rows[len(single) :]], groups

    def _attention(
        self, rows: Sequence[Row], layout: Layout, sharing: Sequence[SharedPrefix]
    ) -> Attention | LayersAttention:
        window, kernels = self.decoder.config.sliding_window, self.device.ops.paged
        if self.decoder.native_layers is not None:
            return NativeAttention(self.state, rows, layout, window, sharing)
        if kernels is None:
            return GatheredAttention(self.state, rows, layout, self.decoder.dtype, window, sharing)
        return PagedAttention.of(self.state, kernels, rows, layout, self.device, window, sharing)

    @torch.inference_mode()
    def sample(self, forward: Forward, calls: Mapping[str, SamplingCall]) -> Launched:
        """Chooses tokens and leaves them in the token pool for the next step."""
        rows = tuple(row for row in forward.rows if row.sample)
        pool = self.state.token_pool
        requests = [
            SampleRow(
                calls[row.call_id].params,
                row.end,
                calls[row.call_id].num_prompt,
                lambda row=row: pool[row.slot, : row.end],  # type: ignore[misc]
                calls[row.call_id].bitmask,
            )
            for row in rows
        ]
        sampled = sample(forward.logits, requests, self.device)
        inside = [i for i, row in enumerate(rows) if row.end < pool.shape[1]]
        ends = [[rows[i].slot for i in inside], [rows[i].end for i in inside]]
        slots, positions = self.device.send(torch.tensor(ends, dtype=torch.int64))
        tokens = sampled.tokens if len(inside) == len(rows) else sampled.tokens[inside]
        pool[slots, positions] = tokens.clamp(min=0)
        sampled = replace(sampled, tokens=self.device.fetch(sampled.tokens))
        return Launched(forward.rows, sampled, self.device.fetch(forward.finite), self.device.record())

    def collect(self, launched: Launched) -> list[RowToken]:
        """Waits for a step, and brings to the host what its rows sampled, and which others are not finite."""
        launched.ready.wait()
        tokens = launched.sampled.tokens.tolist()
        logprobs = launched.sampled.logprobs
        sampling = [row for row in launched.rows if row.sample]
        finite = launched.finite.tolist()
        return [
            RowToken(row, token, token_logprob(token, logprobs[i]) if i in logprobs and token >= 0 else None)
            for i, (row, token) in enumerate(zip(sampling, tokens, strict=True))
        ] + [RowToken(row, -1, None) for row, ok in zip(launched.rows, finite, strict=True) if not (ok or row.sample)]
