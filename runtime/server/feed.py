"""What happens, as it happens: GET /v1/events, for whoever watches. Each tenant has a feed of its own."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

MAX_EVENTS = 2048


@dataclass(frozen=True, slots=True)
class FeedEvent:
    """Something that happened. `id` names its place in the feed, for `Last-Event-ID`."""

    id: str
    kind: str
    data: Mapping[str, Any]


class Feed:
    """The last events of each tenant, and those who wait for the next one.

    A reader keeps nothing but its place, so a slow one costs nothing. One that asks for a place that is gone (it fell
    behind by more than `MAX_EVENTS`, or the server was started anew) is told so by an event of kind `gap`, and goes on
    with the oldest event that is left.
    """

    def __init__(self, max_events: int = MAX_EVENTS) -> None:
        self._max_events = max_events
        self._run = secrets.token_hex(4)
        self._logs: dict[str, _Log] = {}

    def publish(self, tenant: str, kind: str, data: Mapping[str, Any]) -> None:
        """Tells all readers of a tenant. Adds the time, in seconds since 1970."""
        log = self._log(tenant)
        log.count += 1
        log.events.append(FeedEvent(f"{self._run}-{log.count}", kind, {"time": round(time.time(), 6), **data}))
        log.grown.set()
        log.grown = asyncio.Event()

    async def read(self, tenant: str, last_id: str | None = None) -> AsyncGenerator[FeedEvent, None]:
        """Events after the one of that id, or from now on, without end."""
        log = self._log(tenant)
        place = log.count if last_id is None else self._place(last_id)
        while True:
            first = log.count - len(log.events)
            if place is None or not first <= place <= log.count:
                missed = None if place is None or place > log.count else first - place
                yield FeedEvent(f"{self._run}-{first}", "gap", {"missed": missed})
                place = first
                continue
            grown = log.grown
            while place < log.count and place >= log.count - len(log.events):
                event = log.events[place - (log.count - len(log.events))]
                place += 1
                yield event
            if place == log.count:
                await grown.wait()

    def _place(self, event_id: str) -> int | None:
        run, _, number = event_id.rpartition("-")
        return int(number) if run == self._run and number.isdecimal() and len(number) < 16 else None

    def _log(self, tenant: str) -> _Log:
        log = self._logs.get(tenant)
        if log is None:
            log = self._logs[tenant] = _Log(deque(maxlen=self._max_events))
        return log


class _Log:
    """`count` events were published; the last of them are kept."""

    def __init__(self, events: deque[FeedEvent]) -> None:
        self.events = events
        self.count = 0
        self.grown = asyncio.Event()
