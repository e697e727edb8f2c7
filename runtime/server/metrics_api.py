"""`/metrics`, for Prometheus. What it tells is of all tenants together, so with keys it needs an admin's."""

from __future__ import annotations

from aiohttp import web

from treadle.runtime.server.context import SERVER
from treadle.runtime.server.metrics import CONTENT_TYPE
from treadle.runtime.server.routes import Route


async def get_metrics(request: web.Request) -> web.StreamResponse:
    """All figures as they are now."""
    figures = request.app[SERVER].metrics.render()
    return web.Response(body=figures, headers={"Content-Type": CONTENT_TYPE})


ROUTES = (
    Route("GET", "/metrics", get_metrics, "Read figures for Prometheus", media_types=("text/plain",), is_admin=True),
)
