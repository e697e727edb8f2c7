"""The OpenAPI document, made of the routes and the types that they name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from aiohttp import web
from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from treadle.runtime.server.answers import json_answer
from treadle.runtime.server.errors import ErrorBody
from treadle.runtime.server.routes import Route

ALWAYS = {
    400: "The request cannot be",
    401: "A key is needed, or unknown",
    403: "Not for this key, this name of the server, or this web page",
    500: "The server failed",
}
WITH_BODY = {408: "The body came too late", 413: "The body is too large", 415: "The body is encoded"}
WHEN_GENERATING = {
    404: "No such model",
    409: "The program was ended meanwhile",
    429: "Too much at once; Retry-After tells when to try again",
    503: "Nothing is generated now",
}
OTHERS = {404: "There is no such thing", 409: "Not in this state", 429: "Too much at once", 503: "Not now"}
_REFERENCE = "#/components/schemas/{model}"


def route(routes: Sequence[Route], models: Sequence[str]) -> Route:
    """The endpoint that serves the document of these routes."""
    written = document(routes, models)

    async def openapi(request: web.Request) -> web.StreamResponse:
        return json_answer(written)

    return Route("GET", "/openapi.json", openapi, "This document", answer=dict[str, Any], is_public=True)


def document(routes: Sequence[Route], models: Sequence[str]) -> dict[str, Any]:
    """An OpenAPI 3.1 document of a server whose model has these names."""
    schemas = _Schemas(routes)
    for definition in schemas.definitions.values():
        model = definition.get("properties", {}).get("model")
        if model is not None and definition["title"].endswith("Request"):
            model["examples"] = list(models)
    paths: dict[str, dict[str, Any]] = {}
    for each in routes:
        paths.setdefault(_path(each), {})[each.method.lower()] = _operation(each, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Treadle", "version": version("treadle")},
        "paths": paths,
        "components": {
            "schemas": schemas.definitions,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


class _Schemas:
    """The types of all routes as JSON Schemas. `definitions` are those that have names."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.definitions: dict[str, Any] = {}
        self._bodies: dict[Any, dict[str, Any]] = {}
        bodies = [(each.body, "validation") for each in routes if each.body is not None]
        found, defined = models_json_schema(bodies, ref_template=_REFERENCE)  # type: ignore[arg-type]
        self.definitions.update(defined.get("$defs", {}))
        self._bodies = {model: schema for (model, _), schema in found.items()}

    def body(self, model: Any) -> dict[str, Any]:
        return self._bodies[model]

    def of(self, kind: Any) -> dict[str, Any]:
        schema = TypeAdapter(kind).json_schema(mode="serialization", ref_template=_REFERENCE)
        for name, definition in schema.pop("$defs", {}).items():
            known = self.definitions.setdefault(name, definition)
            assert known == definition, f"two types are called {name}"
        return schema


def _path(each: Route) -> str:
    return re.sub(r"\{(\w+):[^{}]*\}", r"{\1}", each.path)


def _operation(each: Route, schemas: _Schemas) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": each.summary,
        "operationId": each.handler.__name__,
        "responses": _responses(each, schemas),
        "security": [] if each.is_public else [{}, {"key": []}],
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{(\w+)\}", _path(each))
    ]
    parameters += [
        {"name": query.name, "in": "query", "description": query.about, "schema": schemas.of(query.kind)}
        for query in each.query
    ]
    if parameters:
        operation["parameters"] = parameters
    if each.body is not None:
        content = {"application/json": {"schema": schemas.body(each.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _responses(each: Route, schemas: _Schemas) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if each.answer is not None:
        content["application/json"] = {"schema": schemas.of(each.answer)}
    for media_type in each.media_types:
        content[media_type] = {"schema": {"type": "string"}}
    if each.streams:
        content["text/event-stream"] = {}  # OpenAPI has no words for its events before 3.2
    success = {"description": each.summary} | ({"content": content} if content else {})
    responses: dict[str, Any] = {str(each.status): success}
    error = {"application/json": {"schema": schemas.of(ErrorBody)}}
    for status, about in sorted(_failures(each).items()):
        # A state that is not good is an answer too: it has the form of one.
        own = content if each.answer is not None and each.is_public and status == 503 else error
        responses[str(status)] = {"description": about, "content": own}
    return responses


def _failures(each: Route) -> Mapping[int, str]:
    generates = WHEN_GENERATING if each.streams and each.body is not None else {}
    named = {status: OTHERS.get(status, "It failed") for status in each.errors}
    return {**ALWAYS, **(WITH_BODY if each.body is not None else {}), **generates, **named}
