"""Distributions learned while running: how long pauses last, how long outputs are."""

from __future__ import annotations

import math
from reprlib import repr as shortened
from typing import Any

LOWEST = 1e-3
BINS_PER_OCTAVE = 4
NUM_BINS = 31 * BINS_PER_OCTAVE
HIGHEST = LOWEST * 2.0**31
FORGET_AT = 4096
ENOUGH = 8
MAX_KEYS = 1024
MAX_NAME = 256
"""Longest name, in characters, that is kept between runs."""

REMEMBERED = 64
"""Most values that a spread from another run counts as, so that what has changed since is soon learned anew."""

NEGLIGIBLE = 1e-3
VERSION = 1


class Spread:
    """A histogram of positive values in bins of equal ratio, so that a few numbers cover milliseconds and days.

    When it holds `FORGET_AT` values all counts are halved: it follows slow changes and stays small.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self._counts = [0.0] * NUM_BINS
        self._sums = [0.0] * NUM_BINS

    def add(self, value: float) -> None:
        """Counts a value; outside of `LOWEST .. HIGHEST` it counts as the nearer one."""
        value = min(max(value, LOWEST), HIGHEST)
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

    def to_json(self) -> list[tuple[int, float, float]]:
        """Plain values for `json.dumps`: index, count and sum of each bin that is not empty."""
        bins = enumerate(zip(self._counts, self._sums, strict=True))
        return [(index, count, total) for index, (count, total) in bins if count > NEGLIGIBLE]

    @classmethod
    def from_json(cls, bins: object) -> Spread:
        """A spread from what `to_json` gave, scaled down to `REMEMBERED` values if it had more.

        Raises `ValueError` for anything else.
        """
        if not isinstance(bins, list | tuple):
            raise ValueError(f"{shortened(bins)} is not a list of bins")
        spread = cls()
        for entry in bins:
            match entry:
                case [int(index), int() | float() as count, int() | float() as total] if _fits(index, count, total):
                    spread._counts[index], spread._sums[index] = float(count), float(total)
                case _:
                    raise ValueError(f"{shortened(entry)} is not the index of a bin, its count and its sum")
        share = REMEMBERED / max(REMEMBERED, sum(spread._counts))
        spread._counts = [count * share for count in spread._counts]
        spread._sums = [total * share for total in spread._sums]
        spread.count = sum(spread._counts)
        return spread


def _bin(value: float) -> int:
    return min(NUM_BINS - 1, int(math.log2(value / LOWEST) * BINS_PER_OCTAVE))


def _fits(index: int, count: float, total: float) -> bool:
    """Whether so many values of a bin can have this sum. False for what is not finite."""
    if not (0 <= index < NUM_BINS and 0 < count <= FORGET_AT):
        return False
    low, rounding = LOWEST * 2 ** (index / BINS_PER_OCTAVE), 1e-6
    return count * low * (1 - rounding) <= total <= count * low * 2 ** (1 / BINS_PER_OCTAVE) * (1 + rounding)


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

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`. What names longer than `MAX_NAME` have learned is left out."""
        names = [(*key, spread.to_json()) for key, spread in self._spreads.items() if _is_short(*key)]
        return {"version": VERSION, "all": self._all.to_json(), "names": names}

    @classmethod
    def from_json(cls, values: object) -> Spreads:
        """Spreads from what `to_json` gave, each scaled down as `Spread.from_json` does.

        Raises `ValueError` for another version, too many names, names that are too long, and all that is no spread.
        """
        if not isinstance(values, dict) or values.get("version") != VERSION:
            raise ValueError(f"{shortened(values)} is not of version {VERSION}")
        names = values.get("names")
        if not isinstance(names, list | tuple) or len(names) > MAX_KEYS:
            raise ValueError(f"its names are not a list of at most {MAX_KEYS}")
        spreads = cls()
        spreads._all = Spread.from_json(values.get("all"))
        for row in names:
            match row:
                case [str(kind), str(name), bins] if _is_short(kind, name):
                    spreads._spreads[kind, name] = Spread.from_json(bins)
                case _:
                    text = f"{shortened(row)} is not a kind, a name and bins, names of at most {MAX_NAME} characters"
                    raise ValueError(text)
        return spreads

    def _latest(self, key: tuple[str, str]) -> Spread:
        spread = self._spreads.pop(key, None) or Spread()
        if len(self._spreads) >= MAX_KEYS:
            del self._spreads[next(iter(self._spreads))]
        self._spreads[key] = spread
        return spread


def _is_short(kind: str, name: str) -> bool:
    return len(kind) <= MAX_NAME and len(name) <= MAX_NAME
