"""`GET /v1/events`: everything that happens to a tenant's programs, as it happens."""

from __future__ import annotations

import contextlib

from aiohttp import web

from treadle.runtime.server.context import SERVER, TENANT
from treadle.runtime.server.routes import Query, Route
from treadle.runtime.server.sse import EventStream


async def watch_events(request: web.Request) -> web.StreamResponse:
    """Streams events, without end: those after the one that `Last-Event-ID` names, or from now on."""
    server = request.app[SERVER]
    last_id = request.headers.get("Last-Event-ID", request.query.get("last_event_id"))
    async with (
        contextlib.aclosing(server.feed.read(request[TENANT].name, last_id)) as events,
        EventStream(request, server.config) as stream,
    ):
        async for event in events:
            await stream.send(event.data, event.kind, event.id)
    return stream.response


ROUTES = (
    Route(
        "GET",
        "/v1/events",
        watch_events,
        "Everything that happens to programs, as it happens",
        streams=True,
        query=(Query("last_event_id", str, "The event after which to begin, as the Last-Event-ID header"),),
    ),
)
