"""Over real HTTP the engine's process is killed again and again, clients vanish, and nothing is lost or leaks."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import pytest
from support.small_model import write_small_model

from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.engine.supervisor import EngineProcess, Restarts, open_engine_process
from treadle.runtime.server.app import listening
from treadle.runtime.server.config import ServerConfig
from treadle.runtime.server.context import Server
from treadle.runtime.server.start import OpenEngine, serving, tokenizer_of

NUM_STREAMS, NUM_KILLS = 50, 20
TIE = 1e-3
"""Two logits closer than this may be told apart differently by sums in another order."""
PATIENCE_S = 120.0
ENGINE = EngineConfig(dtype="float32", num_pages=8192, page_size=4, num_slots=64, num_threads=1)
NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 100}
SCHEMA = {"type": "object", "properties": {"a": NUMBERS}, "required": ["a"]}
CLIENT = """
import asyncio, sys, httpx

async def read(client, index):
    body = {"model": "treadle", "prompt": f"Once {index}", "max_tokens": 1500, "stream": True}
    async with client.stream("POST", sys.argv[1] + "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            print("line", flush=True)

async def main():
    async with httpx.AsyncClient(timeout=None) as client:
        await asyncio.gather(*(read(client, index) for index in range(10)))

asyncio.run(main())
"""


@dataclass
class Live:
    """A server whose engine is in a process of its own, and a client."""

    url: str
    server: Server
    process: EngineProcess
    client: httpx.AsyncClient

    async def until_all_returned(self):
        """Waits until no call is left, and no page is held by one or kept for one."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            report = await self.server.session.inspect()
            pages = report["pages"]
            held = [pages["running"], pages["leased"], *report["calls"].values(), self.server.admission.num_requests]
            if not any(held) and not report["programs"]:
                assert pages["free"] + pages["cached"] == pages["total"] == ENGINE.num_pages
                return
            assert time.monotonic() < deadline, report
            await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_small_model(tmp_path_factory.mktemp("small")))


@asynccontextmanager
async def live(model, **settings):
    config = ServerConfig(model=model, aliases=("small",), port=0, program_idle_s=0.3, **settings)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with open_engine_process(model, ENGINE, Restarts(most=1000, pause_s=0.01)) as process:
        opened = OpenEngine(process, await process.ready(), lambda: process.is_ready, lambda: process.restarts)
        async with (
            serving(config, opened, tokenizer_of(model)) as server,
            listening(server) as url,
            httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits) as client,
        ):
            yield Live(url, server, process, client)


def request(index):
    """Requests of many kinds: greedy, with noise, with penalties, under a grammar, with a string to stop at."""
    body = {
        "model": "small",
        "messages": [{"role": "user", "content": f"{index}: tell me {'more ' * (index % 7)}"}],
        "max_tokens": 200 + index,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 2,
        "temperature": 0,
        "logit_bias": {"258": -100, "256": -100},
    }
    match index % 5:
        case 1:
            body |= {"temperature": 1.0, "seed": index}
        case 2:
            body |= {"temperature": 0.7, "seed": index, "frequency_penalty": 0.6, "top_p": 0.95}
        case 3:
            body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}
        case 4:
            body |= {"stop": ["\x00\x01\x02\x03"]}
    return body


@dataclass
class Answer:
    """What a stream said, event by event."""

    text: str = ""
    tokens: list = field(default_factory=list)
    gaps: list = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict | None = None
    is_done: bool = False

    def take(self, data):
        assert not self.is_done, "something after the end"
        if data == "[DONE]":
            self.is_done = True
            return
        chunk = json.loads(data)
        assert "error" not in chunk, chunk
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            self.text += choice["delta"].get("content") or ""
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            for entry in (choice.get("logprobs") or {}).get("content") or ():
                self.tokens.append(entry["bytes"])
                best = [top["logprob"] for top in entry["top_logprobs"]]
                self.gaps.append(best[0] - best[1] if len(best) > 1 else 0.0)


async def ask(client, body, count=lambda: None) -> Answer:
    answer = Answer()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                answer.take(line.removeprefix("data: "))
                count()
    return answer


def assert_same(expected, actual):
    """The same to the last byte, up to where the two best tokens were nearly tied."""
    for place, (left, right) in enumerate(zip(expected.tokens, actual.tokens, strict=False)):
        if left != right:
            assert expected.gaps[place] < TIE, f"token {place}: {left} != {right}"
            return
    assert actual.tokens == expected.tokens
    assert actual.text == expected.text
    assert actual.finish_reason == expected.finish_reason


async def test_streams_do_not_notice_that_the_engine_is_killed_again_and_again(model):
    async with live(model) as there:
        bodies = [request(index) for index in range(NUM_STREAMS)]
        expected = await asyncio.gather(*(ask(there.client, body) for body in bodies))
        num_events = 0

        def count():
            nonlocal num_events
            num_events += 1

        work = asyncio.gather(*(ask(there.client, body, count) for body in bodies))
        chance = random.Random(7)
        for number in range(NUM_KILLS):
            known, wanted = num_events, chance.randrange(0, 150)
            while not there.process.is_ready or num_events < known + wanted:
                await asyncio.sleep(0.005)
                assert not work.done(), f"all was over before kill {number}"
            os.kill(there.process.pid, signal.SIGKILL)
            while there.process.is_ready:
                await asyncio.sleep(0.001)
        actual = await work
        assert there.process.restarts == NUM_KILLS
        for left, right in zip(expected, actual, strict=True):
            assert right.is_done
            assert right.usage["completion_tokens"] == len(right.tokens) + (right.finish_reason == "stop")
            assert right.usage["prompt_tokens"] == left.usage["prompt_tokens"]
            assert_same(left, right)
        await there.until_all_returned()


@pytest.mark.parametrize("dies", [False, True])
async def test_pages_and_slots_of_clients_that_vanish_return(model, dies):
    async with live(model) as there:
        chance = random.Random(3)

        async def leave(index):
            body = request(index) | {"max_tokens": 1500}
            async with there.client.stream("POST", "/v1/chat/completions", json=body) as response:
                left = chance.randrange(0, 60)
                async for _ in response.aiter_lines():
                    left -= 1
                    if left < 0:
                        return

        async def leave_before_the_answer(index):
            body = {**request(index), "max_tokens": 1500, "stream": False, "stream_options": None}
            with pytest.raises(httpx.ReadTimeout):
                await there.client.post("/v1/chat/completions", json=body, timeout=0.2)

        work = asyncio.gather(*map(leave, range(30)), *map(leave_before_the_answer, range(10)))
        if dies:
            await asyncio.sleep(0.3)
            os.kill(there.process.pid, signal.SIGKILL)
        await work
        await there.until_all_returned()
        assert (await ask(there.client, request(1))).is_done


async def test_pages_and_slots_of_a_client_that_is_killed_return(model):
    async with live(model) as there:
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CLIENT, there.url, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for _ in range(100):
            assert await client.stdout.readline()
        report = await there.server.session.inspect()
        assert report["pages"]["running"] > 0
        client.kill()
        await client.wait()
        await there.until_all_returned()


async def test_a_request_that_comes_while_there_is_no_engine_is_answered(model):
    async with live(model) as there:
        os.kill(there.process.pid, signal.SIGKILL)
        while there.process.is_ready:
            await asyncio.sleep(0.001)
        assert (await there.client.get("/readyz")).status_code == 503
        assert (await there.client.get("/livez")).status_code == 200
        assert (await ask(there.client, request(3))).is_done
        assert (await there.client.get("/readyz")).status_code == 200
