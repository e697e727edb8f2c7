"""Servers for tests: real HTTP on a free port, the event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from treadle.runtime.config import cache_dir
from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.engine.engine import Engine
from treadle.runtime.loading import open_model
from treadle.runtime.models import SHAPES, RandomCheckpoint, resolve
from treadle.runtime.server.app import drain, listening
from treadle.runtime.server.config import ServerConfig
from treadle.runtime.server.context import Server
from treadle.runtime.server.start import running, serving
from treadle.runtime.text.tokenizer import Tokenizer, load_tokenizer

T = TypeVar("T")
PATIENCE = 60.0


@dataclass
class Served:
    """A server that listens. `call` runs something on its loop."""

    url: str
    server: Server
    engine: Engine
    loop: asyncio.AbstractEventLoop

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def drain(self) -> Future[bool]:
        return self.start(drain(self.server))

    def is_idle(self) -> bool:
        """Whether no call is left, in the engine or before it."""
        scheduler = self.engine.scheduler
        live = scheduler.num_running + scheduler.num_waiting + scheduler.num_in_flight
        return not live and not self.server.admission.num_requests


def smollm2_tokenizer() -> Tokenizer:
    return load_tokenizer(resolve("smollm2", cache_dir(), pull=True))


def smollm2_engine(**config: Any) -> tuple[Engine, Tokenizer | None]:
    """The real model."""
    checkpoint, tokenizer = open_model("smollm2", pull=True)
    settings = {"num_pages": 1024, "num_threads": 1, **config}
    return build_engine(checkpoint, tokenizer, EngineConfig(**settings)), tokenizer


def tiny_engine(
    tokenizer: Tokenizer | None, *, shape: str = "tiny-llama", max_context: int = 2048, **config: Any
) -> tuple[Engine, Tokenizer | None]:
    """Random weights, and the real tokenizer with its grammars, unless there is to be none."""
    vocab_size = tokenizer.vocab_size if tokenizer is not None else SHAPES[shape].vocab_size
    checkpoint = RandomCheckpoint(replace(SHAPES[shape], vocab_size=vocab_size, max_context=max_context))
    settings = {"dtype": "float32", "page_size": 4, "num_pages": 4096, "num_threads": 1, **config}
    return build_engine(checkpoint, tokenizer, EngineConfig(**settings)), tokenizer


@contextlib.contextmanager
def served(build: Callable[[], tuple[Engine, Tokenizer | None]], **settings: Any) -> Iterator[Served]:
    """A server on what `build` makes, configured by `settings` of `ServerConfig`."""
    config = ServerConfig(**{"port": 0, "log_level": "error", **settings})
    ready: Future[Served] = Future()
    stop: list[Callable[[], None]] = []

    async def live() -> None:
        stopped = asyncio.Event()
        stop.append(stopped.set)
        engine, tokenizer = build()
        async with running(engine) as opened, serving(config, opened, tokenizer) as server, listening(server) as url:
            ready.set_result(Served(url, server, engine, asyncio.get_running_loop()))
            await stopped.wait()

    def work() -> None:
        try:
            asyncio.run(live())
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    thread = threading.Thread(target=work, name="served", daemon=True)
    thread.start()
    found = ready.result(PATIENCE)
    try:
        yield found
    finally:
        found.loop.call_soon_threadsafe(stop[0])
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server does not end"
