"""What every handler of a server shares."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from aiohttp import web

from treadle.runtime.server.config import ServerConfig
from treadle.runtime.server.errors import ApiError, not_found
from treadle.runtime.server.tenants import Tenant, Tenants

if TYPE_CHECKING:
    from treadle.runtime.engine.session import Session
    from treadle.runtime.engine.wire import EngineInfo
    from treadle.runtime.server.admission import Admission
    from treadle.runtime.server.feed import Feed
    from treadle.runtime.server.metrics import Metrics
    from treadle.runtime.server.programs import Programs
    from treadle.runtime.server.prompts import ChatEncoder
    from treadle.runtime.server.tracing import Tracing
    from treadle.runtime.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Server:
    """A running server: its engine, its model, and everybody who has to do with its requests.

    Attributes:
        engine: What the engine is; `is_engine_there` tells whether it is now.
        tokenizer, encoder: None for random weights, which take and give token ids only.
        draining: The server ends: what runs may finish, others are told to go elsewhere.
        created_at: In seconds since 1970.
    """

    config: ServerConfig
    session: Session
    engine: EngineInfo
    tokenizer: Tokenizer | None
    encoder: ChatEncoder | None
    tenants: Tenants
    admission: Admission
    programs: Programs
    feed: Feed
    metrics: Metrics
    tracing: Tracing
    is_engine_there: Callable[[], bool]
    draining: bool = False
    created_at: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> str:
        """The name under which the model is listed."""
        return self.config.model

    @property
    def models(self) -> tuple[str, ...]:
        """All names under which the model is listed."""
        return tuple(dict.fromkeys([self.model, *self.config.aliases]))

    def check_model(self, name: str) -> None:
        """Raises the error that OpenAI clients know if this server does not serve a model of that name."""
        if name not in (*self.models, "treadle"):
            served = f"this server serves {self.model!r}"
            raise not_found(f"the model {name[:80]!r} does not exist; {served}", "model", "model_not_found")

    def text_model(self) -> tuple[Tokenizer, ChatEncoder]:
        """What makes tokens of text. Raises the error for a request that needs it where there is none."""
        if self.tokenizer is None or self.encoder is None:
            raise ApiError(400, f"{self.model} has no tokenizer; send token ids to /v1/completions", param="model")
        return self.tokenizer, self.encoder


request_headers: ContextVar[Mapping[str, str]] = ContextVar("request_headers", default=MappingProxyType({}))
"""Of the request that this task works on."""
SERVER: web.AppKey[Server] = web.AppKey("server", Server)
TENANT: web.RequestKey[Tenant] = web.RequestKey("tenant", Tenant)
"""Whose request it is, where a key is needed."""
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
PROGRAM_ID: web.RequestKey[str] = web.RequestKey("program_id", str)
"""By which the tenant knows the program that the request belongs to."""
STREAMS: web.RequestKey[bool] = web.RequestKey("streams", bool)
"""Set once an answer has begun: then no other can be given."""
