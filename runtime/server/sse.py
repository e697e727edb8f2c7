"""Answers that come as a stream of events (the HTML standard, section 9.2)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from types import TracebackType

import msgspec
from aiohttp import web

from treadle.runtime.server.answers import cut_off_unless_read, send_whole
from treadle.runtime.server.config import ServerConfig
from treadle.runtime.server.context import STREAMS
from treadle.runtime.server.errors import api_error_of

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
log = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder()


class EventStream:
    """The answer to one request. Use as `async with`; leaving the scope ends the stream.

    In silence it says that it is alive, so that nobody on the way gives up. What a client does not read stays in the
    connection's buffer, some 128 KiB at most, and then `send` waits. A client that reads nothing for
    `stall_timeout_s` is cut off: the handler is cancelled, as at any disconnect.

    Whatever fails within the scope is told as the last event, for the status was sent long ago.
    """

    def __init__(self, request: web.Request, config: ServerConfig, headers: Mapping[str, str] | None = None) -> None:
        self._request = request
        self._response = web.StreamResponse(headers={**HEADERS, **(headers or {})})
        self._ping_s = config.ping_interval_s
        self._stall_s = config.stall_timeout_s
        self._sent_at = time.monotonic()
        self._watch: asyncio.Task[None] | None = None

    @property
    def response(self) -> web.StreamResponse:
        """What the handler returns."""
        return self._response

    async def __aenter__(self) -> EventStream:
        self._request[STREAMS] = True
        await self._response.prepare(self._request)
        self._watch = asyncio.create_task(self._keep_alive(), name="treadle-stream")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        assert self._watch is not None
        watch, self._watch = self._watch, None  # its last frame refers to this stream: no cycle may hold the request
        failed = isinstance(error, Exception) and not isinstance(error, ConnectionError)
        try:
            if failed and error is not None:
                await self._tell(error)
            if failed or error is None:
                await send_whole(self._request, self._response, self._stall_s)
        finally:
            watch.cancel()
        return failed

    async def send(self, data: object, event: str | None = None, event_id: str | None = None) -> None:
        """Sends one event: `data` as JSON."""
        head = (f"id: {event_id}\n" if event_id else "") + (f"event: {event}\n" if event else "")
        await self._write(head.encode() + b"data: " + _encoder.encode(data) + b"\n\n")

    async def done(self) -> None:
        """Sends what OpenAI's streams end with."""
        await self._write(DONE)

    async def _tell(self, error: BaseException) -> None:
        known = api_error_of(error)
        if known.status == 500:
            log.error("a stream failed", exc_info=error)
        await self.send(known.body)

    async def _write(self, data: bytes) -> None:
        self._sent_at = time.monotonic()
        with cut_off_unless_read(self._request, self._stall_s):
            await self._response.write(data)

    async def _keep_alive(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client is gone, and the handler hears of it by itself
            while True:
                await asyncio.sleep(self._ping_s / 2)
                if time.monotonic() - self._sent_at >= self._ping_s:
                    await self._write(PING)
