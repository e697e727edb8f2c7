"""Streams to clients that do not read, or that are on their way out."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket

from aiohttp import web
from aiohttp.test_utils import TestServer

from treadle.runtime.server.config import ServerConfig
from treadle.runtime.server.sse import EventStream

CONFIG = ServerConfig(ping_interval_s=0.002, stall_timeout_s=0.3)


@contextlib.asynccontextmanager
async def asked(handler):
    """A connection that has asked `handler` for its stream, and reads nothing."""
    app = web.Application()
    app.router.add_get("/", handler)
    server = TestServer(app)
    await server.start_server()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((server.host, server.port))
    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    try:
        yield
    finally:
        connection.close()
        await server.close()


def fill(request):
    """Leaves no room between the server and its client."""
    request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    request.transport.set_write_buffer_limits(0)
    request.transport.write(b"x" * 100_000)


async def test_a_client_that_does_not_read_pings_is_cut_off():
    ended = asyncio.Event()

    async def handler(request):
        async with EventStream(request, CONFIG) as stream:
            fill(request)
            for _ in range(62):  # some more bytes, and it is a ping that has to wait
                await stream.send("x" * 1000)
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()
        return stream.response

    async with asked(handler):
        await asyncio.wait_for(ended.wait(), 20)


async def test_a_ping_to_a_connection_that_closes_fails_in_silence():
    failures, ended = [], asyncio.Event()
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))

    async def handler(request):
        async with EventStream(request, CONFIG) as stream:
            fill(request)
            request.transport.close()
            await asyncio.sleep(0.05)
        ended.set()
        return stream.response

    async with asked(handler):
        await asyncio.wait_for(ended.wait(), 20)
        await asyncio.sleep(0.01)
        gc.collect()
    assert failures == []
