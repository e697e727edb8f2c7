"""Answers that are one JSON object, and sending them."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterator

import msgspec
from aiohttp import web

from treadle.runtime.server.errors import ApiError

_encoder = msgspec.json.Encoder()


def json_answer(value: object, status: int = 200) -> web.Response:
    """An answer with a value that JSON knows."""
    return web.Response(body=_encoder.encode(value), status=status, content_type="application/json")


def error_answer(error: ApiError) -> web.Response:
    """An answer with OpenAI's error object."""
    answer = json_answer(error.body, error.status)
    if error.retry_after is not None:
        answer.headers["Retry-After"] = f"{max(1, round(error.retry_after))}"
    return answer


async def send_whole(request: web.Request, response: web.StreamResponse, stall_s: float) -> None:
    """Sends an answer, until the last byte is in the system's hands, or the client is gone or cut off."""
    if request.transport is not None:
        request.transport.set_write_buffer_limits(0)  # nothing waits here for a client that may never read it
    with contextlib.suppress(ConnectionError), cut_off_unless_read(request, stall_s):
        await response.prepare(request)
        await response.write_eof()


@contextlib.contextmanager
def cut_off_unless_read(request: web.Request, stall_s: float) -> Iterator[None]:
    """Within the scope, which sends, closes the connection once its client has read nothing for so long.

    Whoever waits to send wakes then, as at any disconnect.
    """
    if request.transport is None:
        yield
        return
    watch = _StallWatch(request.transport, stall_s)
    try:
        yield
    finally:
        watch.cancel()


class _StallWatch:
    """Looks at what a connection has still to send, until it is cancelled: then nothing refers to it any more.

    There is one for each event of each stream, so it must not be left to the garbage collector.
    """

    def __init__(self, transport: asyncio.Transport, stall_s: float) -> None:
        self._transport = transport
        self._stall_s = stall_s
        self._loop = asyncio.get_running_loop()
        # Not called at all if nothing has to wait.
        self._timer: asyncio.Handle = self._loop.call_soon(self._look, math.inf)

    def _look(self, left: float) -> None:
        if (size := self._transport.get_write_buffer_size()) < left:
            self._timer = self._loop.call_later(self._stall_s, self._look, size)
        else:
            self._transport.abort()

    def cancel(self) -> None:
        self._timer.cancel()
