"""From a configuration to a server that is ready for requests: its engine, its tokenizer, and all who watch it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from treadle.runtime.config import cache_dir
from treadle.runtime.engine.client import EngineClient, ThreadedEngine
from treadle.runtime.engine.session import Session
from treadle.runtime.engine.supervisor import Restarts, open_engine_process
from treadle.runtime.engine.wire import EngineInfo
from treadle.runtime.loading import Check, StoppableCheckpoint, load_in_thread, open_model
from treadle.runtime.models.registry import resolve
from treadle.runtime.server.admission import Admission
from treadle.runtime.server.config import ServerConfig
from treadle.runtime.server.context import Server
from treadle.runtime.server.feed import Feed
from treadle.runtime.server.metrics import Metrics
from treadle.runtime.server.monitor import monitor
from treadle.runtime.server.programs import Programs
from treadle.runtime.server.prompts import ChatEncoder
from treadle.runtime.server.tenants import Tenants
from treadle.runtime.server.tracing import Tracing
from treadle.runtime.server.watchers import ProgramFigures
from treadle.runtime.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from treadle.runtime.engine.engine import Engine


CLOSE_S = 5.0
"""How long the end of a server waits for the accounts of its programs."""


@dataclass(frozen=True, slots=True)
class OpenEngine:
    """An engine that is loaded.

    Attributes:
        is_there: Whether it takes calls now.
        num_restarts: How often it had to begin anew.
    """

    client: EngineClient
    info: EngineInfo
    is_there: Callable[[], bool]
    num_restarts: Callable[[], int] = lambda: 0


def open_engine(config: ServerConfig) -> AbstractAsyncContextManager[OpenEngine]:
    """The engine that the configuration asks for, as a scope. Raises `ModelError` if the model cannot be had, and
    `InvalidRequestError` for settings that cannot be."""
    return _in_process(config) if config.engine == "in-process" else _in_own_process(config)


@contextlib.asynccontextmanager
async def _in_own_process(config: ServerConfig) -> AsyncIterator[OpenEngine]:
    limit = Restarts(most=config.engine_restarts)
    async with open_engine_process(config.model, config.engine_config(), limit) as process:
        yield OpenEngine(process, await process.ready(), lambda: process.is_ready, lambda: process.restarts)


@contextlib.asynccontextmanager
async def _in_process(config: ServerConfig) -> AsyncIterator[OpenEngine]:
    from treadle.runtime.engine.build import build_engine

    def load(check: Check) -> Engine:
        checkpoint, tokenizer = open_model(config.model, pull=False)
        return build_engine(StoppableCheckpoint(checkpoint, check), tokenizer, config.engine_config())

    async with running(await load_in_thread(load, lambda engine: engine.close())) as engine:
        yield engine


@contextlib.asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[OpenEngine]:
    """Turns an engine of this process while the scope lasts."""
    client = ThreadedEngine(engine)
    try:
        yield OpenEngine(client, engine.info, lambda: client.failure is None)
    finally:
        client.close()
        if engine.compiler is not None:
            engine.compiler.close()


@contextlib.asynccontextmanager
async def serving(config: ServerConfig, engine: OpenEngine, tokenizer: Tokenizer | None) -> AsyncIterator[Server]:
    """A server on an engine, ready for requests. Leaving the scope ends its programs.

    Raises `InvalidRequestError` for a file of keys that is faulty, and for spans that cannot be written.
    """
    tracing = Tracing(config.otlp_endpoint, config.model)
    tenants, metrics, feed, admission = Tenants(config.keys), Metrics(), Feed(), Admission(config)
    metrics.watch_requests(lambda: admission.num_waiting, lambda: admission.num_requests)
    async with Session(engine.client) as session:
        programs = Programs(
            session,
            max_programs=config.max_programs,
            idle_s=config.program_idle_s,
            watchers=[feed.publish, ProgramFigures(metrics, tracing)],
            admit=admission.admit_program,
        )
        metrics.watch_programs(programs.states)
        server = Server(
            config=config,
            session=session,
            engine=engine.info,
            tokenizer=tokenizer,
            encoder=ChatEncoder(tokenizer) if tokenizer is not None else None,
            tenants=tenants,
            admission=admission,
            programs=programs,
            feed=feed,
            metrics=metrics,
            tracing=tracing,
            is_engine_there=engine.is_there,
        )
        tasks = [
            asyncio.create_task(programs.expire(), name="treadle-expiry"),
            asyncio.create_task(programs.relay_decisions(), name="treadle-relay"),
            asyncio.create_task(
                monitor(session, metrics, admission, engine.info.page_bytes, engine.num_restarts),
                name="treadle-monitor",
            ),
        ]
        try:
            yield server
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(TimeoutError):  # an engine that hangs gives no accounts
                async with asyncio.timeout(CLOSE_S):
                    await programs.close()
            await asyncio.to_thread(tracing.close)


def tokenizer_of(model: str) -> Tokenizer | None:
    """A model's tokenizer; random weights have none."""
    return None if model.startswith("random:") else load_tokenizer(resolve(model, cache_dir(), pull=False))
