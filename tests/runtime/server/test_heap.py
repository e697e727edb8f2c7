"""What a server does so that its memory stays flat: nothing is left to the collector, nor lost between large blocks."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import subprocess
import sys
from collections import Counter

import pytest
from aiohttp import web

CHAT = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}], "max_completion_tokens": 8}
TEXT = {"model": "smollm2", "prompt": "Hello", "max_tokens": 8}
RESPONSE = {"model": "smollm2", "input": "Hello", "max_output_tokens": 16}
HAS_MALLINFO = hasattr(ctypes.CDLL(None), "mallinfo2")

SERVE_AND_COUNT_MAPPED_BLOCKS = """
import ctypes, sys
from treadle.runtime.cli import serve
from treadle.runtime.cli.main import main

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd".split() + ["rest"] * 5]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info

async def served(config):
    bytes(16 << 20)  # larger than any hole in the heap; the first one that is freed is what moves the threshold
    before = mallinfo().hblks
    held = bytes(16 << 20)
    print(mallinfo().hblks - before)

serve._serve = served
main(sys.argv[1:])
"""


@contextlib.contextmanager
def collected():
    """Counts what is of the server among that which only the garbage collector found, within the scope."""
    found = Counter()
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        for each in gc.garbage:
            of = each if callable(each) and hasattr(each, "__qualname__") else type(each)
            if isinstance(each, web.Request) or str(of.__module__).startswith("treadle."):
                found[of.__qualname__] += 1
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/v1/completions", TEXT, id="completions"),
        pytest.param("/v1/completions", {**TEXT, "stream": True}, id="streamed completions"),
        pytest.param("/v1/chat/completions", CHAT, id="chat"),
        pytest.param("/v1/chat/completions", {**CHAT, "stream": True}, id="streamed chat"),
        pytest.param("/v1/chat/completions", {**CHAT, "stream": True, "n": 3}, id="streamed chat of several answers"),
        pytest.param("/v1/responses", RESPONSE, id="responses"),
        pytest.param("/v1/responses", {**RESPONSE, "stream": True}, id="streamed responses"),
    ],
)
def test_an_answer_leaves_nothing_to_the_garbage_collector(http, path, body):
    assert http.post(path, json=body).status_code == 200
    with collected() as found:
        for _ in range(3):
            assert http.post(path, json=body).status_code == 200
    assert not found


@pytest.mark.skipif(not HAS_MALLINFO, reason="the C library does not tell of its heap")
@pytest.mark.parametrize(("engine", "apart"), [("process", "1"), ("in-process", "0")])
def test_large_blocks_stay_apart_from_the_heap_of_a_server_without_an_engine_in_it(engine, apart):
    command = [sys.executable, "-c", SERVE_AND_COUNT_MAPPED_BLOCKS, "serve", "random:tiny-llama", "--engine", engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == apart, done.stderr
