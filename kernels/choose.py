"""Chooses a token for each row of a batch: mask, temperature, top-k, top-p, min-p and noise, without sorting.

::

    logits of a row   | block 0 | block 1 | block 2 | ...     scan: each block's best logit, and its winner with noise
                           |         |         |
                           `---------+---------+--> row       decide: the row's winner; if a filter limits who may win,
                                                              first the threshold, from the blocks that reach it

Two launches whose grids depend on the shape of the logits only, and no word to the host: a graph can capture them.
What a token is depends on the logits, parameters, seed and position of its row and nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from treadle.kernels.sampling import GREEDY_UP_TO

BLOCK = 2048
"""Logits that a program looks at together."""
SCAN_WARPS = 8
DECIDE_WARPS = 16
GREEDY = tl.constexpr(GREEDY_UP_TO)
PIVOTS = tl.constexpr(8)
"""Thresholds that are tried in one pass over a row's logits."""
NEGLIGIBLE = tl.constexpr(104.0)
"""A logit so far below the best has no weight in float32."""
LOWEST_KEY = tl.constexpr(-(2**31))


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    """The hash of `sampling.gumbel_noise`, of uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _noise(seed: tl.tensor, position: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """The noise of `sampling.gumbel_noise` for the tokens `ids` of a row."""
    key = _mix(_mix(seed.to(tl.uint32)) ^ ((seed >> 32).to(tl.uint32) + 0x632BE5AB))
    key = _mix(key ^ _mix(position.to(tl.uint32) + 0x1B873593))
    bits = _mix(_mix(ids.to(tl.uint32) * 0x9E3779B9 + key) ^ key)
    # NOTE: through int32, which converts faster than uint32; 23 bits are positive.
    uniform = ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * (2.0**-23)
    return -tl.log(-tl.log(uniform))


@triton.jit
def _key(x: tl.tensor) -> tl.tensor:
    """int32 in the order of floats; NaN apart."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # the sum makes -0 and 0 equal
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_key(key: tl.tensor) -> tl.tensor:
    """The float of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _allowed_logits(
    logits: tl.tensor, words: tl.tensor, mask_row: tl.tensor, ids: tl.tensor, V: tl.constexpr, MASKED: tl.constexpr
) -> tl.tensor:
    """Of a row's logits those of the tokens `ids`; minus infinity behind the last one and where the mask forbids."""
    values = tl.load(logits + ids, mask=ids < V, other=-float("inf"))
    if MASKED:  # noqa: SIM102 (known when compiled)
        if mask_row >= 0:
            bits = tl.load(words + (ids >> 5), mask=ids < V, other=0) >> (ids & 31)
            values = tl.where((bits & 1) == 1, values, -float("inf"))
    return values


@triton.jit
def _row_inputs(
    logits: tl.tensor, stride: tl.tensor, bitmasks: tl.tensor, mask_rows: tl.tensor, row: tl.tensor, V: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Where a row's logits and the words of its bitmask are, and which bitmask it is, -1 for none."""
    mask_row = tl.load(mask_rows + row)
    words = bitmasks + mask_row.to(tl.int64) * ((V + 31) // 32)
    return logits + row.to(tl.int64) * stride, words, mask_row


@triton.jit
def scan_kernel(
    bests: tl.tensor,
    winner_values: tl.tensor,
    winners: tl.tensor,
    logits: tl.tensor,
    stride: tl.tensor,
    bitmasks: tl.tensor,
    mask_rows: tl.tensor,
    temperatures: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """One program for each row and block: the best logit, NaN if there is one, and the winner if no filter is on."""
    row, block = tl.program_id(0), tl.program_id(1)
    ids = block * BLOCK_V + tl.arange(0, BLOCK_V)
    row_logits, words, mask_row = _row_inputs(logits, stride, bitmasks, mask_rows, row, V)
    values = _allowed_logits(row_logits, words, mask_row, ids, V, MASKED)
    cell = row * tl.num_programs(1) + block
    broken = tl.max((values != values).to(tl.int32), 0)
    tl.store(bests + cell, tl.where(broken > 0, float("nan"), tl.max(values, 0)))
    temperature = tl.load(temperatures + row)
    unfiltered = (tl.load(top_k + row) <= 0) & (tl.load(top_p + row) >= 1.0) & (tl.load(min_p + row) <= 0.0)
    if (temperature > GREEDY) & unfiltered:
        noise = _noise(tl.load(seeds + row), tl.load(positions + row), ids)
        values = tl.div_rn(values, temperature) + noise
    value, winner = tl.max(values, 0, return_indices=True)
    tl.store(winner_values + cell, value)
    tl.store(winners + cell, block * BLOCK_V + winner)


@triton.jit
def _kth_largest(keys: tl.tensor, k: tl.tensor) -> tl.tensor:
    """The k-th largest of int32 keys by bisection, the lowest possible one if they are fewer."""
    low = tl.full((), LOWEST_KEY, tl.int64)
    high = tl.max(keys, 0).to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        enough = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _threshold(
    low: tl.tensor,
    high: tl.tensor,
    goal: tl.tensor,
    share: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    bests: tl.tensor,
    logits: tl.tensor,
    words: tl.tensor,
    mask_row: tl.tensor,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
    BY_WEIGHT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The largest key between `low` and `high` such that the tokens with it or a larger one count for a goal.

    Tokens count by number, or by probability in units of the best one's. The goal is `goal`, or if that is more the
    `share` of what those from `low` on count for. Each pass tries some thresholds, and drops the keys that none has.

    Returns:
        The key, what the tokens with larger keys count for, and the goal.
    """
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    index = tl.arange(0, PIVOTS)
    above = 0.0
    searching = True
    while searching:
        # From `low`, whose count the share is of, in even steps; the last one is at most `high`.
        steps = ((high - low) * index.to(tl.int64) + (PIVOTS - 1)) // PIVOTS
        pivots = (low + steps).to(tl.int32)
        counts = tl.zeros((PIVOTS, BLOCK_V), tl.float32)
        least = tl.full((BLOCK_V,), 2**31 - 1, tl.int32)
        most = tl.full((BLOCK_V,), LOWEST_KEY, tl.int32)
        for block in range(BLOCKS):
            block_best = _key(tl.div_rn(tl.load(bests + block), temperature))
            if block_best >= low:
                ids = block * BLOCK_V + tl.arange(0, BLOCK_V)
                values = _allowed_logits(logits, words, mask_row, ids, V, MASKED)
                values = tl.div_rn(values, temperature)
                keys = _key(values)
                weights = tl.full((BLOCK_V,), 1.0, tl.float32)
                if BY_WEIGHT:
                    weights = tl.exp(values - best)
                counts += tl.where(keys[None, :] >= pivots[:, None], weights[None, :], 0.0)
                inside = (keys >= low) & (keys <= high)
                least = tl.minimum(least, tl.where(inside, keys, 2**31 - 1))
                most = tl.maximum(most, tl.where(inside, keys, LOWEST_KEY))
        count = tl.sum(counts, 1)
        goal = tl.maximum(goal, share * tl.max(count, 0))
        enough = count >= goal
        above = tl.maximum(above, tl.max(tl.where(enough, 0.0, count), 0))
        failed = tl.min(tl.where(enough, high + 1, pivots.to(tl.int64)), 0)
        low = tl.maximum(tl.max(tl.where(enough, pivots.to(tl.int64), low), 0), tl.min(least, 0).to(tl.int64))
        high = tl.minimum(failed - 1, tl.max(most, 0).to(tl.int64))
        searching = low < high
    return low, above, goal


@triton.jit
def _filtered_winner(
    best: tl.tensor,
    block_bests: tl.tensor,
    temperature: tl.tensor,
    k: tl.tensor,
    p: tl.tensor,
    least_share: tl.tensor,
    seed: tl.tensor,
    position: tl.tensor,
    bests: tl.tensor,
    logits: tl.tensor,
    words: tl.tensor,
    mask_row: tl.tensor,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """The winner among the tokens of a row that top-k, top-p of what that left, and min-p leave."""
    best = tl.div_rn(best, temperature)
    high = _key(best).to(tl.int64)
    threshold = tl.full((), LOWEST_KEY, tl.int64)
    if (k > 0) & (k < V):
        # The best tokens of k blocks are k tokens: the k-th best token is no worse than the worst of these.
        low = _kth_largest(_key(tl.div_rn(block_bests, temperature)), k)
        threshold, _, _ = _threshold(
            low, high, k.to(tl.float32), 0.0, best, temperature,
            bests, logits, words, mask_row, V, BLOCK_V, MASKED, BY_WEIGHT=False,
        )  # fmt: skip
    tied_winners = tl.full((), V, tl.float32)
    if p < 1.0:
        low = tl.maximum(threshold, _key(best - NEGLIGIBLE).to(tl.int64))
        threshold, above, goal = _threshold(
            low, high, tl.full((), 0.0, tl.float32), p, best, temperature,
            bests, logits, words, mask_row, V, BLOCK_V, MASKED, BY_WEIGHT=True,
        )  # fmt: skip
        # Of equal tokens as many as it takes, those with the smaller ids.
        weight = tl.exp(_from_key(threshold.to(tl.int32)) - best)
        tied_winners = tl.maximum(tl.ceil((goal - above) / weight), 1.0)
    lowest = threshold
    if least_share > 0.0:
        lowest = tl.maximum(lowest, _key(best + tl.log(least_share)).to(tl.int64))
    tied_before = 0
    winner = -1
    winning = -float("inf")
    for block in range((V + BLOCK_V - 1) // BLOCK_V):
        if _key(tl.div_rn(tl.load(bests + block), temperature)) >= lowest:
            ids = block * BLOCK_V + tl.arange(0, BLOCK_V)
            values = _allowed_logits(logits, words, mask_row, ids, V, MASKED)
            values = tl.div_rn(values, temperature)
            keys = _key(values)
            tied = (keys == threshold).to(tl.int32)
            first = tied_before + tl.cumsum(tied, 0) <= tied_winners
            kept = (keys >= lowest) & ((keys > threshold) | first)
            tied_before += tl.sum(tied, 0)
            values = tl.where(kept, values + _noise(seed, position, ids), -float("inf"))
            value, index = tl.max(values, 0, return_indices=True)
            winner = tl.where(value > winning, block * BLOCK_V + index, winner)
            winning = tl.maximum(value, winning)
    return winner


@triton.jit
def decide_kernel(
    tokens: tl.tensor,
    bests: tl.tensor,
    winner_values: tl.tensor,
    winners: tl.tensor,
    logits: tl.tensor,
    stride: tl.tensor,
    bitmasks: tl.tensor,
    mask_rows: tl.tensor,
    temperatures: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """One program for each row. `NUM_BLOCKS` is a power of two."""
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    row = tl.program_id(0)
    blocks = tl.arange(0, NUM_BLOCKS)
    cells = row * BLOCKS + blocks
    block_bests = tl.load(bests + cells, mask=blocks < BLOCKS, other=-float("inf"))
    broken = tl.max((block_bests != block_bests).to(tl.int32), 0)
    best = tl.max(block_bests, 0)
    if (broken > 0) | (tl.abs(best) == float("inf")):
        tl.store(tokens + row, -1)
    else:
        temperature = tl.load(temperatures + row)
        k, p, least_share = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
        if (temperature > GREEDY) & ((k > 0) | (p < 1.0) | (least_share > 0.0)):
            row_logits, words, mask_row = _row_inputs(logits, stride, bitmasks, mask_rows, row, V)
            winner = _filtered_winner(
                best, block_bests, temperature, k, p, least_share, tl.load(seeds + row), tl.load(positions + row),
                bests + row * BLOCKS, row_logits, words, mask_row, V, BLOCK_V, MASKED,
            )  # fmt: skip
        else:
            values = tl.load(winner_values + cells, mask=blocks < BLOCKS, other=-float("inf"))
            winner = tl.load(winners + row * BLOCKS + tl.argmax(values, 0))
        tl.store(tokens + row, winner.to(tl.int64))


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
    """A token for each row of `[R, V]` float32 logits, which are not changed.

    What the bitmask allows is divided by the temperature; top-k keeps the k best and their equals, top-p of these the
    fewest that reach the probability p, and min-p of these those at least so likely as that share of the likeliest. The
    token is the best of what is left after `sampling.gumbel_noise` was added.

    Args:
        temperatures: float32 `[R]`; up to `GREEDY_UP_TO` only the bitmask and the best logit count.
        top_k: int64 `[R]`, 0 for all.
        top_p, min_p: float32 `[R]`, 1 and 0 for all.
        seeds, positions: int64 `[R]`.
        bitmasks: int32 `[M, ceil(V / 32)]`, a bit for each token; None if nothing is forbidden.
        mask_rows: int64 `[R]`, each row's bitmask, -1 for none.

    Returns:
        int64 `[R]`; -1 where the best of the allowed logits is not finite.
    """
    rows, size = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    assert bitmasks is None or (bitmasks.is_contiguous() and bitmasks.shape[1] == triton.cdiv(size, 32))
    num_blocks = triton.cdiv(size, BLOCK)
    bests, winner_values = (torch.empty(rows, num_blocks, device=logits.device) for _ in range(2))
    winners = torch.empty(rows, num_blocks, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    masks = mask_rows if bitmasks is None else bitmasks
    given = (logits, logits.stride(0), masks, mask_rows, temperatures, top_k, top_p, min_p, seeds, positions)
    fixed = {"V": size, "BLOCK_V": BLOCK, "MASKED": bitmasks is not None}
    scan_kernel[(rows, num_blocks)](bests, winner_values, winners, *given, **fixed, num_warps=SCAN_WARPS)
    decide_kernel[(rows,)](
        tokens,
        bests,
        winner_values,
        winners,
        *given,
        **fixed,
        NUM_BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=DECIDE_WARPS,
    )
    return tokens
