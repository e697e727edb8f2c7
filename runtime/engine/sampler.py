"""Chooses the next token of each row of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from treadle.kernels.sampling import penalize
from treadle.runtime.engine.device import Device
from treadle.runtime.errors import InvalidRequestError
from treadle.scheduler import SamplingParams, TokenLogprob

NO_PENALTIES = 1.0, 0.0, 0.0
MAX_LOGPROBS = 100
MAX_STOPS = 64


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A row that samples: how, at which position, and its tokens so far (read only when penalties need them).

    `bitmask` is int32 `[ceil(V / 32)]`: the tokens that a grammar allows; None allows all.
    """

    params: SamplingParams
    position: int
    num_prompt: int
    history: Callable[[], Tensor]
    bitmask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """One entry for each row: the token (-1 if the row's logits were not finite), and its logprobs if asked for."""

    tokens: Tensor
    logprobs: dict[int, tuple[Tensor, Tensor, Tensor]]


def sample(logits: Tensor, rows: Sequence[SampleRow], device: Device) -> Sampled:
    """Samples a token for each row of `[R, V]` float32 logits, which may be overwritten."""
    reported = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    logprobs = {i: _top_logprobs(logits[i], rows[i].params) for i in reported}
    for i, row in enumerate(rows):
        if _is_adjusted(row.params):
            _adjust(logits[i], row, device)
    params = [row.params for row in rows]
    shares = torch.tensor([[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]])
    temperatures, top_p, min_p = device.send(shares)
    masks = [row.bitmask for row in rows if row.bitmask is not None]
    numbers_of_masks = count()
    mask_rows = [-1 if row.bitmask is None else next(numbers_of_masks) for row in rows]
    numbers = [[p.seed for p in params], [row.position for row in rows], [p.top_k for p in params], mask_rows]
    seeds, positions, top_k, mask_row = device.send(torch.tensor(numbers, dtype=torch.int64))
    tokens = device.ops.choose(
        logits,
        temperatures=temperatures,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        positions=positions,
        bitmasks=device.send(torch.stack(masks)) if masks else None,
        mask_rows=mask_row,
    )
    return Sampled(tokens, logprobs)


def _is_adjusted(params: SamplingParams) -> bool:
    return bool(params.logit_bias) or _penalties(params) != NO_PENALTIES


def _penalties(params: SamplingParams) -> tuple[float, float, float]:
    return params.repetition_penalty, params.presence_penalty, params.frequency_penalty


def _adjust(logits: Tensor, row: SampleRow, device: Device) -> None:
    params = row.params
    if _penalties(params) != NO_PENALTIES:
        penalize(logits, row.history(), row.num_prompt, *_penalties(params))
    if params.logit_bias:
        ids, values = zip(*params.logit_bias, strict=True)
        logits[device.send(torch.tensor(ids))] += device.send(torch.tensor(values))


def _top_logprobs(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """All logprobs of a row, and the largest with their ids."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(params.logprobs or 0)
    return logprobs, values, ids


def token_logprob(token_id: int, logprobs: tuple[Tensor, Tensor, Tensor]) -> TokenLogprob:
    """The reported form of what `_top_logprobs` kept."""
    every, values, ids = logprobs
    return TokenLogprob(token_id, float(every[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Raises `InvalidRequestError` for a value that means nothing, naming it and its range."""

    def require(condition: bool, name: str, allowed: str) -> None:
        if not condition:
            raise InvalidRequestError(f"{name} is {getattr(params, name)!r}; it must be {allowed}")

    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        require(math.isfinite(getattr(params, name)), name, "a finite number")
    require(0 <= params.temperature <= 100, "temperature", "between 0 and 100")
    require(params.top_k >= 0, "top_k", "0 (off) or a positive number")
    require(0 < params.top_p <= 1, "top_p", "above 0 and at most 1")
    require(0 <= params.min_p <= 1, "min_p", "between 0 and 1")
    require(0 < params.repetition_penalty <= 100, "repetition_penalty", "above 0 and at most 100")
    require(abs(params.presence_penalty) <= 100, "presence_penalty", "between -100 and 100")
    require(abs(params.frequency_penalty) <= 100, "frequency_penalty", "between -100 and 100")
    require(-(2**63) <= params.seed < 2**63, "seed", "a 64-bit integer")
    require(params.logprobs is None or 0 <= params.logprobs <= MAX_LOGPROBS, "logprobs", f"0 .. {MAX_LOGPROBS}")
    require(len(params.stop) <= MAX_STOPS, "stop", f"at most {MAX_STOPS} strings")
    require(all(params.stop), "stop", "strings that are not empty")
    for token_id, bias in params.logit_bias:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(f"logit_bias names token {token_id}; ids lie in 0 .. {vocab_size - 1}")
        if not abs(bias) <= 1000:
            raise InvalidRequestError(f"logit_bias of token {token_id} is {bias}; it must be between -1000 and 1000")
