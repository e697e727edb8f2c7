"""Servers that several tests share, and clients of them."""

from __future__ import annotations

from functools import partial

import httpx
import openai
import pytest
from support.serving import served, smollm2_engine, smollm2_tokenizer, tiny_engine


@pytest.fixture(scope="session")
def tokenizer():
    return smollm2_tokenizer()


@pytest.fixture(scope="session")
def smollm2():
    """A server of the real model, for what must make sense."""
    with served(smollm2_engine) as server:
        yield server


@pytest.fixture(scope="session")
def smollm2_url(smollm2):
    return smollm2.url


@pytest.fixture(scope="session")
def exact_smollm2_url():
    """The real model with full weights: a token is the same whatever is computed beside it or was kept before."""
    with served(partial(smollm2_engine, weights="full")) as server:
        yield server.url


@pytest.fixture(scope="session")
def tiny(tokenizer):
    """A server of random weights with a real tokenizer: fast, and without sense."""
    with served(partial(tiny_engine, tokenizer)) as server:
        yield server


@pytest.fixture
def serve(tokenizer):
    """A function that opens a server of random weights of its own: `with serve(max_choices=2) as server`."""

    def scope(engine=None, **settings):
        return served(partial(tiny_engine, tokenizer, **(engine or {})), **settings)

    return scope


@pytest.fixture
def http(tiny):
    with httpx.Client(base_url=tiny.url, timeout=60) as client:
        yield client


@pytest.fixture
def client(tiny):
    with openai.OpenAI(base_url=tiny.v1, api_key="none", max_retries=0) as client:
        yield client
