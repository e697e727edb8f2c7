"""The web application: every endpoint, behind what every request passes through; and listening for requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from treadle.runtime.server import chat, completions, feed_api, metrics_api, models, openapi, programs_api
from treadle.runtime.server.context import SERVER, Server
from treadle.runtime.server.middlewares import MIDDLEWARES, ROUTES_BY_HANDLER, add_headers
from treadle.runtime.server.responses import handlers as responses
from treadle.runtime.server.responses.store import RESPONSES, ResponseStore
from treadle.runtime.server.routes import Route

ROUTES: tuple[Route, ...] = (
    *chat.ROUTES,
    *completions.ROUTES,
    *responses.ROUTES,
    *programs_api.ROUTES,
    *feed_api.ROUTES,
    *models.ROUTES,
    *metrics_api.ROUTES,
)
DRAIN_STEP_S = 0.05
LINGER_S = 1.0
"""How long the rest of a body that was refused is read on, so that the client reads the answer before it is cut off."""


class _NotWhatClientsSend(logging.Filter):
    """Keeps what is not HTTP out of the log: anybody could fill it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def build_app(server: Server) -> web.Application:
    """The application of one server."""
    app = web.Application(middlewares=MIDDLEWARES)
    routes = (*ROUTES, openapi.route(ROUTES, server.models))
    app[SERVER] = server
    app[RESPONSES] = ResponseStore()
    app[ROUTES_BY_HANDLER] = {route.handler: route for route in routes}
    for route in routes:
        app.router.add_route(route.method, route.path, route.handler)
    app.on_response_prepare.append(add_headers)
    return app


@contextlib.asynccontextmanager
async def listening(server: Server) -> AsyncIterator[str]:
    """Takes requests within the scope; gives the URL. Leaving it closes every connection.

    Raises `OSError` if the address cannot be had.
    """
    config, logger = server.config, logging.getLogger("treadle.http")
    logger.filters[:] = [_NotWhatClientsSend()]
    runner = web.AppRunner(
        build_app(server),
        logger=logger,
        handler_cancellation=True,  # cancel the handler when its client is gone
        access_log=None,
        keepalive_timeout=config.idle_timeout_s,
        lingering_time=LINGER_S,
        max_line_size=config.max_header_bytes,
        max_field_size=config.max_header_bytes,
        auto_decompress=False,
        shutdown_timeout=0.1,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.host, config.port)
        await site.start()
        port = runner.addresses[0][1]
        host = f"[{config.host}]" if ":" in config.host else config.host
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def drain(server: Server) -> bool:
    """Takes no more requests that generate, and waits for those that do. Returns whether they ended in time."""
    server.draining = True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(server.config.drain_timeout_s):
            while server.admission.num_requests:
                await asyncio.sleep(DRAIN_STEP_S)
    return server.admission.num_requests == 0
