"""From logits to a token: penalties, temperature, filters, and noise that depends on nothing but seed and position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GREEDY_UP_TO = 1e-5
"""Temperatures up to this mean greedy: dividing by them would overflow."""
ARGMAX_BLOCK = 256
"""Logits among which a maximum is looked for at a time."""


def choose(
    logits: Tensor,
    *,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    bitmasks: Tensor | None,
    mask_rows: Tensor,
) -> Tensor:
    """Chooses a token for each row: mask, temperature, top-k, top-p, min-p, and the argmax with Gumbel noise.

    Args:
        logits: `[R, V]` float32. Bitmasks are written into it.
        temperatures: `[R]`; up to `GREEDY_UP_TO` the best token is taken, and the rest does not matter.
        top_k: `[R]`, 0 for off.
        top_p, min_p: `[R]`, 1 and 0 for off.
        seeds, positions: `[R]` int64: the noise is a function of these.
        bitmasks: int32 `[M, ceil(V / 32)]`, whose zero bits are tokens that must not be chosen; None if all may be.
        mask_rows: `[R]`, the bitmask of each row, -1 for none.

    Returns:
        `[R]` int64; -1 where the best logit is not finite.
    """
    if bitmasks is not None:
        masked = (mask_rows >= 0).nonzero().flatten()
        logits[masked] = apply_bitmask(logits[masked], bitmasks[mask_rows[masked]])
    # The argmax of a row with a NaN is the NaN: looking at the best logit is looking at all of them.
    tokens = argmax(logits)
    finite = logits.gather(-1, tokens[:, None])[:, 0].isfinite()
    noisy = (temperatures > GREEDY_UP_TO).nonzero().flatten()
    if len(noisy):
        logits = logits[noisy] / temperatures[noisy, None]
        limited = (top_k[noisy] > 0).nonzero().flatten()
        if len(limited):
            logits[limited] = keep_top_k(logits[limited], top_k[noisy][limited])
        nucleus = (top_p[noisy] < 1).nonzero().flatten()
        if len(nucleus):
            logits[nucleus] = keep_top_p(logits[nucleus], top_p[noisy][nucleus])
        if bool(min_p[noisy].any()):
            logits = keep_min_p(logits, min_p[noisy])
        noise = gumbel_noise(seeds[noisy], positions[noisy], logits.shape[-1])
        tokens[noisy] = argmax(noise.add_(logits))
    return tokens.masked_fill_(~finite, -1)


def argmax(logits: Tensor) -> Tensor:
    """The index of the largest of each row of `[R, V]`, or of its first NaN.

    On a processor torch finds maxima several times as fast as where they are: that is looked for in one block of a row.
    """
    rows, width = logits.shape
    size = math.gcd(width, ARGMAX_BLOCK)
    if not logits.is_cpu or size < ARGMAX_BLOCK // 16:
        return logits.argmax(-1)
    blocks = logits.reshape(rows, width // size, size)
    best = blocks.amax(-1).argmax(-1)
    return best * size + blocks[torch.arange(rows), best].argmax(-1)


def penalize(
    logits: Tensor, history: Tensor, num_prompt: int, repetition: float, presence: float, frequency: float
) -> None:
    """Applies penalties to one row of `[V]` logits, in place.

    Args:
        history: `[N]` tokens so far, the first `num_prompt` of them the prompt.
        repetition: Divides positive and multiplies negative logits of all of them (CTRL, arXiv 1909.05858).
        presence, frequency: Subtracted for generated tokens, once and once for each occurrence.
    """
    if repetition != 1.0:
        seen = torch.unique(history)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / repetition, values * repetition)
    if presence or frequency:
        tokens, counts = torch.unique(history[num_prompt:], return_counts=True)
        logits[tokens] -= presence + frequency * counts


def apply_bitmask(logits: Tensor, bitmask: Tensor) -> Tensor:
    """Minus infinity, in place, for tokens of `[R, V]` whose bit in the int32 words `[R, ceil(V / 32)]` is zero."""
    bits = (bitmask[:, :, None] >> torch.arange(32, dtype=torch.int32, device=bitmask.device)) & 1
    return logits.masked_fill_(bits.flatten(1)[:, : logits.shape[-1]] == 0, float("-inf"))


def keep_top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Minus infinity for all but the `k` `[R]` largest of each row of `[R, V]`; k is at least 1."""
    k = k.clamp(max=logits.shape[-1])
    largest = logits.topk(int(k.max()), dim=-1).values
    threshold = largest.gather(-1, (k - 1)[:, None])
    return logits.masked_fill(logits < threshold, float("-inf"))


def keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Minus infinity outside the smallest set of tokens of each row whose probabilities reach `p` `[R]`."""
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, index, before >= p[:, None])
    dropped.scatter_(-1, index[:, :1], False)
    return logits.masked_fill(dropped, float("-inf"))


def keep_min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Minus infinity for tokens less likely than `p` `[R]` times the most likely one."""
    threshold = logits.amax(-1, keepdim=True) + p[:, None].log()
    return logits.masked_fill(logits < threshold, float("-inf"))


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise `[R, V]` that is a function of seed, position and token only (counter-based, no generator state).

    Args:
        seeds, positions: `[R]`, int64.
    """
    index = torch.arange(vocab_size, dtype=torch.int32, device=seeds.device)
    key = _mix(_mix(_low(seeds)) ^ (_low(seeds >> 32) + 0x632BE5AB))
    key = _mix(key ^ _mix(_low(positions) + 0x1B873593))
    bits = _mix(_mix(index[None, :] * -1640531527 + key[:, None]) ^ key[:, None])
    # 23 bits and a half: with one bit more the largest value would round to 1, whose noise is infinite.
    uniform = ((bits >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def _low(x: Tensor) -> Tensor:
    """The low 32 bits of int64, as int32."""
    x = x & 0xFFFFFFFF
    return torch.where(x >= 2**31, x - 2**32, x).to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    """An integer hash with good avalanche (the 32-bit "lowbias" finaliser of Wellons' hash prospector)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -2073254261
    return x ^ ((x >> 16) & 0xFFFF)
