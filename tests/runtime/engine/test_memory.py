"""A model that memory cannot hold is refused before it is read, with the smallest changes that let it fit."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from support.engines import Bench

from treadle.kernels.int4 import can_multiply_int4
from treadle.runtime.engine import memory
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.engine.memory import footprint, num_kv_pages
from treadle.runtime.engine.native import is_native
from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.models import SHAPES, RandomCheckpoint

GIB = 2**30
LLAMA_8B = RandomCheckpoint(SHAPES["llama-3.1-8b"])
"""In bfloat16 15.0 GiB of weights, and 16 GiB of KV for its longest context."""

needs_int4 = pytest.mark.skipif(
    not can_multiply_int4(torch.device("cpu"), torch.bfloat16),
    reason="this processor has no product with 4-bit weights",
)


needs_native = pytest.mark.skipif(
    not is_native(LLAMA_8B.config, EngineConfig(dtype="bfloat16")), reason="native.c cannot be used here"
)


@pytest.fixture
def machine(monkeypatch):
    """Sets how much memory there is, in GiB."""
    return lambda gib: monkeypatch.setattr(memory, "usable_memory", lambda: int(gib * GIB))


def in_bfloat16(**settings):
    return EngineConfig(**{"dtype": "bfloat16", "native": False, **settings})


FITTING = [
    (24, {}, [{"max_context": 73_728}, {"weights": "int4-only"}]),
    (19, {"max_context": 8192, "weights": "int4"}, [{"weights": "full"}]),
    (16, {}, [{"max_context": 8192}]),
    (12, {}, [{"weights": "int4-only", "max_context": 48_128}]),
    (8, {}, [{"weights": "int4-only", "max_context": 15_360}]),
]


@needs_int4
@pytest.mark.parametrize(("gib", "settings", "changes"), FITTING)
def test_the_smallest_changes_that_let_a_model_fit_are_proposed(gib, settings, changes, machine):
    machine(gib)
    words = [" and ".join(f"{name}={value!r}" for name, value in change.items()) for change in changes]
    with pytest.raises(InvalidRequestError, match=f"use {re.escape(', or '.join(words))}$"):
        num_kv_pages(LLAMA_8B, in_bfloat16(**settings))
    for change in changes:
        assert num_kv_pages(LLAMA_8B, in_bfloat16(**(settings | change))) > 0


FITTING_CODES = [
    (24, {}, [{"max_context": 73_728}, {"weights": "int4"}]),
    (20, {"max_context": 65_536}, [{"max_context": 40_960}, {"weights": "int8"}]),
    (8, {}, [{"weights": "int4", "max_context": 15_360}]),
]


@needs_native
@pytest.mark.parametrize(("gib", "settings", "changes"), FITTING_CODES)
def test_codes_alone_are_proposed_where_they_are_the_only_form(gib, settings, changes, machine):
    machine(gib)
    words = [" and ".join(f"{name}={value!r}" for name, value in change.items()) for change in changes]
    with pytest.raises(InvalidRequestError, match=f"use {re.escape(', or '.join(words))}$"):
        num_kv_pages(LLAMA_8B, in_bfloat16(native=True, **settings))
    for change in changes:
        assert num_kv_pages(LLAMA_8B, in_bfloat16(native=True, **(settings | change))) > 0


def test_what_no_change_lets_fit_is_too_large(machine):
    machine(4)
    with pytest.raises(InvalidRequestError, match=r"use a smaller model$"):
        num_kv_pages(LLAMA_8B, in_bfloat16())


def test_float32_is_told_of_bfloat16(machine):
    machine(40)
    with pytest.raises(InvalidRequestError, match=r"use max_context=40960, or dtype='bfloat16'$"):
        num_kv_pages(LLAMA_8B, EngineConfig(dtype="float32"))


def test_what_is_needed_missing_and_there_is_said(machine):
    machine(24)
    expected = (
        "KV pages of one context of 131,072 tokens take 16.0 GiB and the weights 15.0 GiB, 7.0 GiB more than the "
        "24.0 GiB that this process may use; use "
    )
    with pytest.raises(InvalidRequestError, match=re.escape(expected)):
        num_kv_pages(LLAMA_8B, in_bfloat16())


def test_pages_that_were_asked_for_are_the_cause_where_the_weights_fit(machine):
    machine(24)
    with pytest.raises(InvalidRequestError, match=r"10000 KV pages take 19\.5 GiB and .*; use fewer pages$"):
        num_kv_pages(LLAMA_8B, in_bfloat16(num_pages=10_000))
    assert num_kv_pages(LLAMA_8B, in_bfloat16(num_pages=1_000)) == 1_000


def test_a_pool_takes_no_more_than_the_weights_leave(machine):
    machine(16)
    config = in_bfloat16(max_context=4096)
    needs = footprint(LLAMA_8B, config)
    left = (16 * GIB - needs.weights) // needs.page
    assert num_kv_pages(LLAMA_8B, config) == left < 2 * GIB // needs.page
    machine(64)
    assert num_kv_pages(LLAMA_8B, config) == 2 * GIB // needs.page


def test_nothing_is_read_of_a_model_that_does_not_fit(machine, monkeypatch):
    machine(1)
    monkeypatch.setattr(RandomCheckpoint, "tensor", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(InvalidRequestError, match="that this process may use"):
        Bench("llama-3.1-8b")


@needs_int4
@pytest.mark.parametrize(("weights", "bytes_per_weight"), [("full", 2), ("int4", 2.625), ("int4-only", 0.625)])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_counted_in_every_form_that_is_kept(weights, bytes_per_weight, tied):
    checkpoint = RandomCheckpoint(dataclasses.replace(SHAPES["tiny-llama"], tied_embeddings=tied))
    matrices = 2 * (64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 192)
    config = in_bfloat16(weights=weights, packed_weights=False)
    head = 512 * 64 * 2
    assert footprint(checkpoint, config).weights == matrices * bytes_per_weight + head * (1 if tied else 2)
