"""A runtime with the real tokenizer and grammar, and a random-weight model that is fast."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest

from treadle.runtime.config import cache_dir
from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.client import ThreadedEngine
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.local import LocalRuntime
from treadle.runtime.models import SHAPES, RandomCheckpoint, resolve
from treadle.runtime.text.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(resolve("smollm2", cache_dir(), pull=True))


@pytest.fixture(scope="session")
def checkpoint(tokenizer):
    return RandomCheckpoint(replace(SHAPES["tiny-llama"], vocab_size=tokenizer.vocab_size, max_context=2048))


@pytest.fixture
def fast_runtime(tokenizer, checkpoint):
    """A function that opens a runtime as a scope. (A fixture would open it in another context than the test's.)"""

    @contextlib.asynccontextmanager
    async def scope(*, recorder=None, **config):
        settings = {"dtype": "float32", "page_size": 4, "num_pages": 2048, "num_threads": 1, **config}
        engine = build_engine(checkpoint, tokenizer, EngineConfig(**settings))
        runtime = LocalRuntime("fast", checkpoint.config, tokenizer, engine.compiler, ThreadedEngine(engine), recorder)
        async with runtime:
            yield runtime

    return scope
