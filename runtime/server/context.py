"""What every handler of a server shares."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp import web

from treadle.runtime.server.config import ServerConfig
from treadle.runtime.server.errors import ApiError, not_found

if TYPE_CHECKING:
    from treadle.runtime.engine.session import Session
    from treadle.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine turned out to be, once it is loaded."""

    max_context: int
    max_calls: int
    vocab_size: int
    num_pages: int
    page_size: int
    device: str
    dtype: str


@dataclass(slots=True)
class Server:
    """A running server: its engine, its model, and everybody who has to do with its requests.

    Attributes:
        model: The name under which the model is listed.
        tokenizer: None for random weights, which take and give token ids only.
        draining: The server ends: requests that run may finish, others are told to go elsewhere.
        num_active: Requests that generate now.
    """

    config: ServerConfig
    model: str
    tokenizer: Tokenizer | None
    session: Session
    engine: EngineFacts
    created_at: int = field(default_factory=lambda: int(time.time()))
    started_at: float = field(default_factory=time.monotonic)
    draining: bool = False
    num_active: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def check_model(self, name: str) -> None:
        """Raises the error that OpenAI clients know if this server does not serve a model of that name."""
        if name not in (self.model, "treadle", *self.config.aliases):
            served = f"this server serves {self.model!r}"
            raise not_found(f"the model {name!r} does not exist; {served}", "model", "model_not_found")

    def text_model(self) -> Tokenizer:
        """The tokenizer. Raises the error for a request that needs one where there is none."""
        if self.tokenizer is None:
            raise ApiError(400, f"{self.model} has no tokenizer; send token ids to /v1/completions", param="model")
        return self.tokenizer


SERVER: web.AppKey[Server] = web.AppKey("server", Server)

