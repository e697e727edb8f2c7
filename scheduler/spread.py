"""Distributions learned while running: how long pauses last, how long outputs are."""

from __future__ import annotations

import math

LOWEST = 1e-3
BINS_PER_OCTAVE = 4
NUM_BINS = 31 * BINS_PER_OCTAVE
FORGET_AT = 4096
ENOUGH = 8
MAX_KEYS = 1024


class Spread:
    """A histogram of positive values in bins of equal ratio, so that a few numbers cover milliseconds and days.

    When it holds `FORGET_AT` values all counts are halved: it follows slow changes and stays small.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self._counts = [0.0] * NUM_BINS
        self._sums = [0.0] * NUM_BINS

    def add(self, value: float) -> None:
        """Counts a value; below `LOWEST` it counts as that."""
        value = max(value, LOWEST)
        index = _bin(value)
        self._counts[index] += 1
        self._sums[index] += value
        self.count += 1
        if self.count >= FORGET_AT:
            self._counts = [count / 2 for count in self._counts]
            self._sums = [total / 2 for total in self._sums]
            self.count /= 2

    def mean(self) -> float:
        """The mean of the values; `LOWEST` without any."""
        return sum(self._sums) / self.count if self.count else LOWEST

    def remaining(self, elapsed: float) -> float:
        """Expected value of X - elapsed, given that X > elapsed.

        Beyond all values seen, what has lasted so long is expected to last as long again (the break-even rule of
        ski rental, which needs no distribution).
        """
        first = _bin(max(elapsed, LOWEST))
        # Of the bin that `elapsed` lies in only the share above it is left, taking its values as spread evenly.
        low, high = LOWEST * 2 ** (first / BINS_PER_OCTAVE), LOWEST * 2 ** ((first + 1) / BINS_PER_OCTAVE)
        share = min(1.0, max(0.0, (high - max(elapsed, low)) / (high - low)))
        partial = self._counts[first] * share
        count = partial + sum(self._counts[first + 1 :])
        if count < 0.5:
            return elapsed
        inside = self._sums[first] / self._counts[first] if self._counts[first] else 0.0
        total = partial * max(inside, (max(elapsed, low) + high) / 2) + sum(self._sums[first + 1 :])
        return max(0.0, total / count - elapsed)

    def quantile(self, share: float) -> float:
        """The value that this share of the values does not exceed, to the width of a bin."""
        wanted, seen = share * self.count, 0.0
        for index, count in enumerate(self._counts):
            seen += count
            if count and seen >= wanted:
                return self._sums[index] / count
        return LOWEST


def _bin(value: float) -> int:
    return min(NUM_BINS - 1, int(math.log2(value / LOWEST) * BINS_PER_OCTAVE))


class Spreads:
    """A spread for each (kind of program, name), with the pooled ones of the kind and of all while it has few values.

    There are at most `MAX_KEYS`; one more takes the place of that which was added to longest ago.
    """

    def __init__(self) -> None:
        self._all = Spread()
        self._spreads: dict[tuple[str, str], Spread] = {}
        """Those added to last come last."""

    def add(self, key: tuple[str, str], value: float) -> None:
        for part in (key, (key[0], "")) if key[1] else (key,):
            self._latest(part).add(value)
        self._all.add(value)

    def expect(self, key: tuple[str, str], value: float) -> None:
        """Says what a value of a key is like before any was seen: it counts as a few that were."""
        if key not in self._spreads:
            spread = self._latest(key)
            for _ in range(ENOUGH):
                spread.add(value)

    def of(self, key: tuple[str, str]) -> Spread:
        """The most specific spread that has seen enough; the pooled one of all if none has."""
        for part in (key, (key[0], "")):
            spread = self._spreads.get(part)
            if spread is not None and spread.count >= ENOUGH:
                return spread
        return self._all

    def _latest(self, key: tuple[str, str]) -> Spread:
        spread = self._spreads.pop(key, None) or Spread()
        if len(self._spreads) >= MAX_KEYS:
            del self._spreads[next(iter(self._spreads))]
        self._spreads[key] = spread
        return spread
