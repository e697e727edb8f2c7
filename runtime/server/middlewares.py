"""What every request passes through, outermost first: sending, its id and log line, errors as objects, origin, key."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from aiohttp import web

from treadle.runtime.server.answers import error_answer, send_whole
from treadle.runtime.server.context import PROGRAM_ID, REQUEST_ID, SERVER, STREAMS, TENANT, request_headers
from treadle.runtime.server.errors import ApiError, ErrorType, api_error_of, invalid
from treadle.runtime.server.logs import log_request, new_request_id, request_id
from treadle.runtime.server.origins import check_origin, cors_headers
from treadle.runtime.server.routes import Handler, Route

log = logging.getLogger(__name__)
_TYPES: dict[int, ErrorType] = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


@web.middleware
async def delivered(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Sends an answer that is no stream, to a client that reads it."""
    response = await handler(request)
    if not response.prepared:
        await send_whole(request, response, request.app[SERVER].config.stall_timeout_s)
    return response


@web.middleware
async def observed(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Names the request, and counts and logs how it was answered."""
    begun, status = time.monotonic(), 499  # what nginx calls a client that did not wait
    request[REQUEST_ID] = new_request_id(request.headers.get("x-request-id"))
    tokens = request_id.set(request[REQUEST_ID]), request_headers.set(request.headers)
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        seconds, endpoint = time.monotonic() - begun, _endpoint(request)
        tenant = request[TENANT].name if TENANT in request else ""
        request.app[SERVER].metrics.answered(request.method, endpoint, status, seconds)
        log_request(request.method, endpoint, status, seconds, tenant)
        request_id.reset(tokens[0])
        request_headers.reset(tokens[1])


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Makes every failure the error object that clients know. Once an answer has begun, it is cut off instead."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        kind = _TYPES.get(error.status, "invalid_request_error")
        answer = error_answer(ApiError(error.status, _said(request, error), type=kind, code=_code(error)))
        if "Allow" in error.headers:
            answer.headers["Allow"] = error.headers["Allow"]
        return answer
    except ConnectionError:
        raise  # the client is gone
    except Exception as error:
        known = api_error_of(error)
        if known.status == 500:
            log.exception("a request failed")
        if _has_begun(request):
            raise
        return error_answer(known)


@web.middleware
async def in_text(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses a first line or a header that is no UTF-8: what it is read as then can be written nowhere."""
    try:
        "".join([request.raw_path, *request.headers.values()]).encode()
    except UnicodeEncodeError:
        raise invalid("the first line or a header has bytes that are not UTF-8", None, "invalid_text") from None
    return await handler(request)


@web.middleware
async def from_allowed_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses web pages, and names of this machine, that are not ours; answers what browsers ask beforehand."""
    check_origin(request.headers, request.app[SERVER].config)
    if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
        return web.Response(status=204)
    return await handler(request)


@web.middleware
async def authenticated(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Finds out whose request it is: `request[TENANT]`."""
    route = request.app[ROUTES_BY_HANDLER].get(request.match_info.handler)
    if route is None or not route.is_public:
        tenant = request.app[SERVER].tenants.authenticate(request.headers.get("Authorization"))
        request[TENANT] = tenant
        if route is not None and route.is_admin and not tenant.is_admin:
            raise ApiError(403, "this needs an admin's key", type="permission_error", code="admin_only")
    return await handler(request)


MIDDLEWARES = (delivered, observed, errors, in_text, from_allowed_origin, authenticated)
ROUTES_BY_HANDLER: web.AppKey[Mapping[Handler, Route]] = web.AppKey("routes", Mapping)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Headers of every answer. For `on_response_prepare`."""
    server = request.app[SERVER]
    response.headers["Server"] = "treadle"
    response.headers["x-request-id"] = request[REQUEST_ID]
    if PROGRAM_ID in request:
        response.headers["x-treadle-program-id"] = request[PROGRAM_ID]
    response.headers.update(cors_headers(request.headers, server.config))


def _endpoint(request: web.Request) -> str:
    """The route as it was declared: few values, whatever people ask for."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unknown"


def _has_begun(request: web.Request) -> bool:
    return STREAMS in request


def _said(request: web.Request, error: web.HTTPException) -> str:
    if error.status == 404:
        return f"there is nothing at {request.method} {request.path[:200]!r}"
    if error.status == 405:
        allowed = error.headers.get("Allow", "")
        return f"{request.path[:200]!r} is not there for {request.method}; it is for {allowed}"
    return error.reason


def _code(error: web.HTTPException) -> str:
    return error.reason.lower().replace(" ", "_")
