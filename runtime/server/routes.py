"""One row for each endpoint: what is served there, and what the OpenAPI document says of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from aiohttp import web
from pydantic import BaseModel

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Query:
    """A parameter in the address. `kind` is its type, as `int` or `Literal["json", "svg"]`."""

    name: str
    kind: Any
    about: str


@dataclass(frozen=True, slots=True)
class Route:
    """An endpoint.

    Attributes:
        path: As aiohttp writes it: `/v1/programs/{program_id}`.
        body: The model of the request's JSON; None where there is no body.
        answer: The type of the answer's JSON (a TypedDict, a pydantic model); None where it is not JSON.
        media_types: Other forms of the answer.
        streams: Whether the answer may be an event stream too.
        status: Of success.
        errors: Statuses of failure, beside those that every endpoint may give.
        is_public: Whether it is served without a key.
        is_admin: Whether it needs the admin's key.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    body: type[BaseModel] | None = None
    answer: Any = None
    media_types: tuple[str, ...] = ()
    streams: bool = False
    status: int = 200
    errors: tuple[int, ...] = ()
    query: tuple[Query, ...] = ()
    is_public: bool = False
    is_admin: bool = False
