"""How long the reader of a turn had to wait."""

from __future__ import annotations

import time

from treadle.runtime.server.metrics import Metrics


class Pace:
    """Measures the time to the first token of all answers, and from each token of an answer to the next.

    Attributes:
        first_token_s: None while there is no token.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.first_token_s: float | None = None
        self._metrics = metrics
        self._begun = time.monotonic()
        self._last: dict[int, float] = {}

    @property
    def elapsed_s(self) -> float:
        """Since the request was taken on."""
        return time.monotonic() - self._begun

    def tokens(self, index: int) -> None:
        """An answer has more tokens."""
        now = time.monotonic()
        if self.first_token_s is None:
            self.first_token_s = now - self._begun
            self._metrics.first_token(self.first_token_s)
        if index in self._last:
            self._metrics.next_token(now - self._last[index])
        self._last[index] = now
