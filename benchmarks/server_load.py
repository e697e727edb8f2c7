"""What the server adds to the engine: many streams at once, its processor time and latency for a token, its throughput.

    python benchmarks/server_load.py                          500 streams on a small random-weight model for 60 s
    python benchmarks/server_load.py --model smollm2 --streams 16      the share of a real model's throughput

Each stream asks for greedy tokens after a random prompt, and asks again when it has them, until the time is up. The
same is done at 16 streams on an engine in this process, without HTTP. Tokens are counted as they come: a stream that
ends early, that has another number of tokens than the server counted, or that has other ones than the first answer to
the same prompt, is a failure, and any failure ends the benchmark with an error. Where two answers part, the engine is
asked for the two best tokens: if their logprobs are less than 1e-3 apart, batches may choose either. In bfloat16 they
may anyhow, so there answers are not compared.

`server_cpu` is the processor time of the server's own process, without the engine's. `memory_growth` is the slope of
the least-squares line through the memory of the second half; a line that falls counts as flat. What is bounded must be
full by then: there are twice as many programs and pages as the streams need, and before anything is measured thousands
of streams of one token come and go. `added_latency` is the difference of the medians of the seconds between two tokens
of a stream, at least 0. The clients run on the same machine and take their share of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import aiohttp
import torch
from live.server import Ended, RunningServer, running_server, stream
from report import Parameter, Report, parser

from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.client import ThreadedEngine
from treadle.runtime.engine.config import DTYPES, EngineConfig, torch_dtype
from treadle.runtime.engine.session import CallStream, Session
from treadle.runtime.loading import open_model
from treadle.scheduler import SamplingParams, SubmitCall

FEW, MANY = 16, 500
SECONDS = 60.0
PROMPT, NEW = 32, 64
PROMPTS = 64
FILLING = 5000
GREEDY = SamplingParams(temperature=0)
TIE = 1e-3

Source: TypeAlias = Callable[[Sequence[int], int], AsyncIterator["list[int] | Ended"]]
"""Gives greedy tokens after a prompt, at most so many, as they come."""


@dataclass
class Load:
    """What came of many streams."""

    most: float = math.inf
    begun: int = 0
    tokens: int = 0
    streams: int = 0
    seconds: float = 0.0
    first_s: list[float] = field(default_factory=list)
    next_s: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)


class Clients:
    """So many streams at a time, for a while. Each prompt's first answer is what the others must be equal to."""

    def __init__(self, source: Source, prompts: Sequence[Sequence[int]], new_tokens: int, *, is_exact: bool) -> None:
        self._source = source
        self._prompts = prompts
        self._new_tokens = new_tokens
        self._is_exact = is_exact
        self._answers: dict[int, list[int]] = {}
        self.partings: list[list[int]] = []
        """What came before two answers to a prompt parted, with the prompt."""

    async def load(self, num_streams: int, seconds: float = math.inf, most: float = math.inf) -> Load:
        """Streams that begin within the seconds, and no more than so many, all of them to their end."""
        found, began = Load(most=most), time.perf_counter()
        await asyncio.gather(*(self._client(number, began + seconds, found) for number in range(num_streams)))
        found.seconds = time.perf_counter() - began
        return found

    async def _client(self, number: int, until: float, found: Load) -> None:
        turn = number
        while time.perf_counter() < until and found.begun < found.most:
            found.begun += 1
            try:
                await self._stream(turn % len(self._prompts), found)
            except Exception as error:
                found.failures[f"{type(error).__name__}: {error}"] += 1
                await asyncio.sleep(0.1)
            turn += 1

    async def _stream(self, index: int, found: Load) -> None:
        token_ids: list[int] = []
        last = time.perf_counter()
        async for event in self._source(self._prompts[index], self._new_tokens):
            if isinstance(event, Ended):
                self._check(index, token_ids, event, found)
                continue
            now = time.perf_counter()
            (found.next_s if token_ids else found.first_s).append(now - last)
            last = now
            token_ids += event
        found.tokens += len(token_ids)
        found.streams += 1

    def _check(self, index: int, token_ids: list[int], ended: Ended, found: Load) -> None:
        hidden = 1 if ended.reason == "stop" else 0  # the token that says that the text is over
        if len(token_ids) not in (ended.generated, ended.generated - hidden):
            found.failures["a token was lost or came twice"] += 1
        elif ended.reason == "length" and len(token_ids) != self._new_tokens:
            found.failures["fewer tokens came than were asked for"] += 1
        elif self._is_exact and (known := self._answers.setdefault(index, token_ids)) != token_ids:
            pairs = enumerate(zip(known, token_ids, strict=False))
            common = next((i for i, (one, other) in pairs if one != other), min(len(known), len(token_ids)))
            self.partings.append([*self._prompts[index], *known[:common]])


class Watched:
    """The memory and the processor time of a server, while somebody loads it."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._samples: list[tuple[float, dict[str, int]]] = []
        self.cpu_s = 0.0

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Within the scope."""
        task = asyncio.create_task(self._sample())
        before = self._server.cpu_s()
        yield
        self.cpu_s = self._server.cpu_s() - before
        task.cancel()

    async def _sample(self) -> None:
        while True:
            self._samples.append((time.perf_counter(), self._server.resident_bytes()))
            await asyncio.sleep(0.5)

    def growth(self, process: str) -> float:
        """MiB a minute in the second half."""
        half = self._samples[len(self._samples) // 2 :]
        if len(half) < 3:
            return 0.0
        line = statistics.linear_regression([at for at, _ in half], [held[process] for _, held in half])
        return max(0.0, line.slope * 60 / 2**20)


class OwnEngine:
    """An engine in this process."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._program = session.open_program()

    def _submit(self, token_ids: Sequence[int], new_tokens: int, sampling: SamplingParams) -> CallStream:
        call = SubmitCall(self._session.new_id("call"), self._program, tuple(token_ids), sampling, new_tokens)
        return self._session.submit(call)[0]

    async def tokens(self, prompt: Sequence[int], new_tokens: int) -> AsyncIterator[list[int] | Ended]:
        """A `Source`."""
        call = self._submit(prompt, new_tokens, GREEDY)
        async for event in call:
            yield list(event.token_ids)
        assert call.finished is not None
        yield Ended(call.finished.reason, call.finished.usage.decoded, 0)

    async def gap(self, token_ids: Sequence[int]) -> float:
        """How far the logprobs of the two best next tokens are apart."""
        call = self._submit(token_ids, 1, replace(GREEDY, logprobs=2))
        (best, second), *_ = [[value for _, value in event.logprobs[0].top[:2]] async for event in call]
        return best - second


@contextlib.asynccontextmanager
async def own_engine(args: argparse.Namespace) -> AsyncIterator[OwnEngine]:
    """Loads the model here."""
    checkpoint, _ = open_model(args.model, pull=True)
    config = EngineConfig(dtype=args.dtype, num_threads=args.threads, prefix_cache=False)
    engine = ThreadedEngine(build_engine(checkpoint, None, config))
    try:
        async with Session(engine) as session:
            yield OwnEngine(session)
    finally:
        engine.close()


async def measure(args: argparse.Namespace, report: Report) -> Counter[str]:
    """All figures; returns what failed."""
    noise, vocabulary = random.Random(0), range(open_model(args.model, pull=True)[0].config.vocab_size)
    prompts = [noise.choices(vocabulary, k=PROMPT) for _ in range(PROMPTS)]
    is_exact = torch_dtype(args.dtype) is torch.float32
    failures: Counter[str] = Counter()
    async with own_engine(args) as engine:
        clients = Clients(engine.tokens, prompts, args.new_tokens, is_exact=is_exact)
        await clients.load(FEW, args.seconds / 10)
        alone = await clients.load(FEW, args.seconds / 2)
        failures += alone.failures
    flags = ["--dtype", args.dtype, "--threads", str(args.threads), "--max-running", str(max(64, args.streams))]
    num_pages = 2 * max(FEW, args.streams) * (PROMPT + args.new_tokens) // 16
    flags += ["--no-prefix-cache", "--kv-pages", str(num_pages), "--max-programs", str(2 * max(FEW, args.streams))]
    async with (
        running_server(args.model, flags) as server,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout()) as session,
    ):
        clients = Clients(
            lambda prompt, new: stream(session, server.url, prompt, new), prompts, args.new_tokens, is_exact=is_exact
        )
        filling = Clients(lambda prompt, _: stream(session, server.url, prompt, 1), prompts, 1, is_exact=False)
        await filling.load(FEW, most=args.filling)
        for num_streams, seconds in ((FEW, args.seconds / 2), (args.streams, args.seconds)):
            watched = Watched(server)
            async with watched.watching():
                load = await clients.load(num_streams, seconds)
            failures += load.failures
            add_load(report, load, watched, num_streams)
            if num_streams == FEW:
                compare(report, load, alone)
            if args.streams == FEW:
                break
    async with own_engine(args) as engine:
        gaps = [await engine.gap(token_ids) for token_ids in clients.partings]
    failures["a prompt had two answers"] += sum(gap >= TIE for gap in gaps)
    report.add("ties", sum(gap < TIE for gap in gaps), "streams", batch=args.streams)
    report.add("failures", failures.total(), "streams", batch=args.streams)
    return +failures


def add_load(report: Report, load: Load, watched: Watched, num_streams: int) -> None:
    """Of one number of streams."""
    report.add("tokens", load.tokens, "tokens", batch=num_streams, streams_ended=load.streams)
    if not load.tokens:
        return
    report.add("tokens_per_second", load.tokens / load.seconds, "tokens/s", batch=num_streams)
    report.add("ttft_p50", 1e3 * statistics.median(load.first_s), "ms", batch=num_streams)
    report.add("server_cpu", 1e6 * watched.cpu_s / load.tokens, "us/token", batch=num_streams)
    for process in ("server", "engine"):
        report.add("memory_growth", watched.growth(process), "MiB/minute", batch=num_streams, process=process)


def compare(report: Report, load: Load, alone: Load) -> None:
    """The whole path beside the engine alone."""
    medians = {"server": statistics.median(load.next_s), "engine": statistics.median(alone.next_s)}
    for path, seconds in medians.items():
        report.add("inter_token_p50", 1e3 * seconds, "ms", batch=FEW, path=path)
    report.add("added_latency", max(0.0, 1e3 * (medians["server"] - medians["engine"])), "ms", batch=FEW)
    report.add("engine_tokens_per_second", alone.tokens / alone.seconds, "tokens/s", batch=FEW)
    ratio = (load.tokens / load.seconds) / (alone.tokens / alone.seconds)
    report.add("throughput_ratio", ratio, "x", batch=FEW)


def main() -> None:
    options = parser((__doc__ or "").partition("\n")[0])
    options.add_argument("--model", default="random:tiny-llama", help="name, path or random:SHAPE")
    options.add_argument("--dtype", choices=DTYPES, default="float32", help="element type (default: float32)")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for tensor operations")
    options.add_argument("--streams", type=int, default=MANY, help=f"most at once (default: {MANY})")
    options.add_argument("--seconds", type=float, default=SECONDS, help=f"of the most streams (default: {SECONDS:g})")
    options.add_argument("--filling", type=int, default=FILLING, help=f"short streams first (default: {FILLING})")
    options.add_argument("--new-tokens", type=int, default=NEW, help=f"of each stream (default: {NEW})")
    args = options.parse_args()
    if args.quick:
        args.streams, args.seconds, args.new_tokens, args.filling = 32, 3.0, 16, 100
    common: dict[str, Parameter] = {"model": args.model, "threads": args.threads, "seconds": args.seconds}
    common |= {"dtype": str(torch_dtype(args.dtype)).removeprefix("torch.")}
    common |= {"prompt_tokens": PROMPT, "new_tokens": args.new_tokens}
    report = Report(common, as_json=args.json)
    failures = asyncio.run(measure(args, report))
    report.finish()
    if failures:
        raise SystemExit("; ".join(f"{count} times: {text}" for text, count in failures.items()))


if __name__ == "__main__":
    main()
