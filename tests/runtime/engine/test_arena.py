"""Memory of KV pages is there before calls need it, and what calls have written stays."""

from __future__ import annotations

import ctypes
import mmap
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.engines import Bench, checkpoint
from treadle.runtime.engine.arena import Arena
from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.client import ThreadedEngine
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.errors import InvalidRequestError

PAGE = (4, 2, 64)  # 1 KiB in bfloat16: 2,048 pages of a region at once


def resident(memory: torch.Tensor) -> float:
    """The share of a contiguous tensor for which the system has given memory."""
    begin = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (memory.data_ptr() + memory.nbytes - begin) // mmap.PAGESIZE
    found = (ctypes.c_ubyte * size)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(size * mmap.PAGESIZE), found) == 0
    return sum(byte & 1 for byte in found) / size


def touch_all(arena: Arena, num_used: int) -> int:
    count = 0
    while arena.touch_ahead(num_used):
        count += 1
    return count


def test_what_is_never_touched_takes_no_memory():
    assert resident(Arena(3, 40_000, PAGE, torch.bfloat16).kv) == 0


def test_an_eighth_is_ready_and_as_much_again_as_was_used():
    arena = Arena(3, 40_000, PAGE, torch.bfloat16)
    touch_all(arena, 0)
    assert all(resident(region[:5_000]) == 1 for region in arena.kv.flatten(0, 1))
    assert resident(arena.kv) < 0.3
    assert touch_all(arena, 2_000) == 0, "there is still enough"
    assert touch_all(arena, 10_000) > 0
    assert all(resident(region[10_000:20_000]) == 1 for region in arena.kv.flatten(0, 1))
    assert resident(arena.kv) < 0.7
    touch_all(arena, 40_000)
    assert touch_all(arena, 40_000) == 0


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 9)), max_size=8))
def test_pages_in_use_are_never_written(steps: list[tuple[int, int]]):
    arena = Arena(2, 5_000, PAGE, torch.bfloat16)
    num_used = 0
    for more, touches in steps:
        arena.kv[:, :, num_used : num_used + more] = 7
        num_used += more
        for _ in range(touches):
            arena.touch_ahead(num_used)
        assert (arena.kv[:, :, :num_used] == 7).all()


def test_an_engine_without_work_gets_its_memory_ready():
    config = EngineConfig(dtype="float32", num_pages=50_000, page_size=4, num_slots=2, num_threads=1)
    engine = build_engine(checkpoint("tiny-llama"), None, config)
    kv = engine.runner.state.kv
    assert resident(kv) < 0.1
    client = ThreadedEngine(engine)
    try:
        deadline = time.monotonic() + 60
        while resident(kv[0, 0, :6_250]) < 1 or resident(kv[-1, -1, :6_250]) < 1:
            assert time.monotonic() < deadline, "the engine's thread touched nothing"
            time.sleep(0.01)
    finally:
        client.close()


@pytest.mark.parametrize("page_size", [4, 16])
def test_what_was_computed_stays(page_size: int):
    """The prompt of the second call is in the cache: it is right only if nothing has been written over."""
    prompt = list(range(5, 45))
    config = EngineConfig(dtype="float32", num_pages=64, page_size=page_size, num_slots=2, num_threads=1)
    bench = Bench(engine=build_engine(checkpoint("tiny-llama"), None, config))
    for name in ("first", "second"):
        bench.submit(name, prompt, max_tokens=12)
        bench.run()
        while bench.engine.touch_ahead():
            pass
    first, second = bench.calls["first"], bench.calls["second"]
    assert first.end.usage.cached == 0 < second.end.usage.cached
    assert first.token_ids == second.token_ids


def test_too_little_address_space_says_what_to_do():
    with pytest.raises(InvalidRequestError, match=r"GiB for 1000000000000 KV pages .* use fewer \(num_pages\)"):
        Arena(30, 10**12, PAGE, torch.bfloat16)
