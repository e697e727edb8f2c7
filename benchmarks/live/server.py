"""`treadle serve` in a process of its own, for benchmarks: started, asked, watched from outside, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec

START_S = 300.0
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class _Choice(msgspec.Struct):
    token_ids: list[int] = []
    finish_reason: str | None = None


class _Cached(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    completion_tokens: int
    prompt_tokens_details: _Cached


class _Chunk(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


_decoder = msgspec.json.Decoder(_Chunk)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a stream ended, as the server counts: tokens generated, and tokens of the prompt that were cached."""

    reason: str
    generated: int
    cached: int


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that takes requests at `url`. `pid` is its own process; the engine's is a child of it."""

    url: str
    pid: int

    def cpu_s(self) -> float:
        """Seconds of processor time of the server, without its engine."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def resident_bytes(self) -> dict[str, int]:
        """Memory of the server and of its engine."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        pids = {"server": [str(self.pid)], "engine": children}
        return {
            name: sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES for pid in found)
            for name, found in pids.items()
        }


@contextlib.asynccontextmanager
async def running_server(model: str, flags: Sequence[str]) -> AsyncIterator[RunningServer]:
    """Serves a model while the scope lasts. Raises `RuntimeError` if the server ends before it listens."""
    command = [
        sys.executable,
        "-m",
        "treadle.runtime.cli.main",
        "serve",
        model,
        "--port",
        "0",
        "--log-level",
        "warning",
    ]
    process = await asyncio.create_subprocess_exec(*command, *flags, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            url = ""
            while not url:
                line = (await process.stdout.readline()).decode()
                if not line:
                    raise RuntimeError(f"{' '.join(command)} ended before it listened")
                match = re.search(r"http://\S+?(?=/v1)", line)
                url = match[0] if match else ""
        reading = asyncio.create_task(process.stdout.read())
        yield RunningServer(url, process.pid)
        reading.cancel()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


async def stream(
    client: aiohttp.ClientSession,
    url: str,
    prompt: Sequence[int],
    max_tokens: int,
    headers: Mapping[str, str] | None = None,
) -> AsyncIterator[list[int] | Ended]:
    """Greedy token ids as they come, then how it ended. Raises `RuntimeError` for an answer that is an error or ends
    early."""
    body = {"model": "treadle", "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "stream": True}
    body |= {"return_token_ids": True, "stream_options": {"include_usage": True}}
    async with client.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}")
        reason, usage, rest, done = "", None, b"", False
        async for data in answer.content.iter_any():
            *events, rest = (rest + data).split(b"\n\n")
            for event in events:
                if not event.startswith(b"data: {"):
                    done = done or event == b"data: [DONE]"
                    continue
                chunk = _decoder.decode(event[6:])
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    reason = choice.finish_reason or reason
                    if choice.token_ids:
                        yield choice.token_ids
        if not done or usage is None:
            raise RuntimeError("a stream ended early")
        yield Ended(reason, usage.completion_tokens, usage.prompt_tokens_details.cached_tokens)


async def first_token_s(
    client: aiohttp.ClientSession, url: str, prompt: Sequence[int], headers: Mapping[str, str]
) -> tuple[float, int]:
    """Seconds from a request to its first token, and how many tokens of the prompt were cached."""
    began, first, cached = time.perf_counter(), 0.0, 0
    async for event in stream(client, url, prompt, 1, headers):
        if isinstance(event, Ended):
            cached = event.cached
        else:
            first = first or time.perf_counter() - began
    return first, cached
