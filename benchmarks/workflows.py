"""How much sooner a workflow is complete because its program is known, and how much less is computed for it.

    python benchmarks/workflows.py --model smollm2

The workflows are those of `examples/`, on one engine in three ways:

    treadle      as programs: open calls, forks, tools that start while the turn still decodes
    gather       each call alone, with a complete prompt, as soon as its inputs are there (asyncio.gather)
    sequential   the same, but each call and tool is awaited before the next

The prefix cache is on in all of them. Each run is a tenant of its own, so that it finds nothing of another run. A
round runs the three ways one after another, every round in another order; a ratio is the median of those of the
rounds, with the lowest and the highest of them beside it. The default is float32, where the tokens do not depend on
the batch: the results of the ways are compared, and a difference is an error. Tools that an example answers at once
sleep as long as the row says.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from baselines.plain_client import PlainClient
from report import Parameter, Report, parser

from treadle.dsl import Tool, program, use_backend
from treadle.grammar.compiler import Compiler
from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.client import ThreadedEngine
from treadle.runtime.engine.config import DTYPES, EngineConfig, torch_dtype
from treadle.runtime.engine.session import Session
from treadle.runtime.executor.executor import Executor
from treadle.runtime.loading import open_model
from treadle.runtime.text.tokenizer import Tokenizer
from treadle.scheduler import Usage

EXAMPLES = Path(__file__).parents[1] / "examples"
WAYS = ("treadle", "gather", "sequential")
ROUNDS = 5
QUICK = ("extraction", "best of n")
TOOL_SECONDS = 0.5
LETTERS = (
    "Ada Lovelace was born in London in 1815. She loved mathematics, and wrote the first program for a machine.",
    "Marie Curie was born in Warsaw in 1867. She found two elements, and won the Nobel prize twice.",
    "Claude Monet was born in Paris in 1840. He painted the same pond in his garden for many years.",
    "Nelson Mandela was born in Mvezo in 1918. He was a lawyer, a prisoner, and the president of his country.",
)
BRIEF = (
    "a small bakery by the sea. It has been in the hands of one family since 1921, and stands at the end of the "
    "pier of a fishing village, where the first boats come in at five in the morning. Its bread is made of rye and "
    "wheat from two farms on the island, of salt from the old pans behind the dunes, and of a sourdough that the "
    "great-grandmother of the baker brought from the mainland in a jar. In summer people queue for the rolls with "
    "smoked mackerel, and in winter for a dark loaf with caraway that keeps for a week. There is no shop, only a "
    "window, a bench and a bell. Most customers are fishermen, school children and, since a newspaper wrote about "
    "the loaf, people who take the ferry for it. The family wants more of them in winter, and no more in summer; it "
    "will not sell to supermarkets, does not like big words, and is proud of the bell"
)


@dataclass(frozen=True, slots=True)
class Workflow:
    """Something to run, with the seconds that each of its tools sleeps."""

    name: str
    run: Callable[[], Awaitable[Any]]
    tool_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a workflow, one way."""

    result: Any
    seconds: float
    num_calls: int
    num_prefilled: int
    num_decoded: int

    @classmethod
    def of(cls, result: Any, seconds: float, num_calls: int, usages: Iterable[Usage]) -> Run:
        usages = list(usages)
        prefilled = sum(usage.prefilled + usage.re_prefilled for usage in usages)
        return cls(result, seconds, num_calls, prefilled, sum(usage.decoded for usage in usages))


class Bench:
    """An engine, and the ways to run a workflow on it. Made by `open_bench`."""

    def __init__(self, model: str, session: Session, tokenizer: Tokenizer, compiler: Compiler) -> None:
        self._session, self._tokenizer, self._compiler = session, tokenizer, compiler
        self.executor = Executor(model, session, tokenizer, compiler)
        self._tenants = itertools.count()

    async def run(self, workflow: Workflow, way: str) -> Run:
        """Runs a workflow in an empty part of the cache."""
        if way == "treadle":
            result, seconds = await self._timed(workflow, self.executor)
            account = self.executor.programs[-1].account
            return Run.of(result, seconds, account.calls, [account.usage])
        client = PlainClient(self._session, self._tokenizer, self._compiler, one_by_one=way == "sequential")
        result, seconds = await self._timed(workflow, client)
        return Run.of(result, seconds, len(client.usages), client.usages)

    async def _timed(self, workflow: Workflow, backend: Executor | PlainClient) -> tuple[Any, float]:
        with use_backend(backend):
            start = time.perf_counter()
            async with program(workflow.name, tenant=f"run {next(self._tenants)}"):
                result = await workflow.run()
                seconds = time.perf_counter() - start
        return result, seconds


@contextlib.asynccontextmanager
async def open_bench(model: str, config: EngineConfig) -> AsyncIterator[Bench]:
    """Loads a model, and closes it with the scope."""
    checkpoint, tokenizer = open_model(model, pull=True)
    if tokenizer is None:
        sys.exit(f"{model} has no tokenizer, and workflows are made of text; take another model, such as smollm2")
    engine = build_engine(checkpoint, tokenizer, config)
    assert engine.compiler is not None
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(engine.compiler.close)
        client = ThreadedEngine(engine)
        stack.callback(client.close)
        session = await stack.enter_async_context(Session(client))
        bench = Bench(model, session, tokenizer, engine.compiler)
        stack.push_async_callback(bench.executor.close)
        yield bench


def workflows() -> list[Workflow]:
    """One for each example. The body of a `main` runs in the program that the benchmark opened."""
    extract, summary, agent, best, chain = map(example, ("extract", "map_reduce", "tool_agent", "best_of_n", "chain"))
    look_up = agent.lookup
    agent.lookup = lambda database: slowed(look_up(database), TOOL_SECONDS)
    slowed(agent.calculate, TOOL_SECONDS)

    async def extraction() -> Any:
        return await extract.extract.map(LETTERS)

    async def best_of_n() -> Any:
        return await best.main.__wrapped__(BRIEF)

    return [
        Workflow("extraction", extraction),
        Workflow("map-reduce summary", summary.main.__wrapped__),
        Workflow("tool agent", agent.main.__wrapped__, TOOL_SECONDS),
        Workflow("best of n", best_of_n),
        Workflow("streaming chain", chain.main.__wrapped__),
    ]


def example(name: str) -> Any:
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def slowed(tool: Tool[..., Any], seconds: float) -> Tool[..., Any]:
    """The tool, sleeping before it answers."""
    answer = tool.fn
    assert tool.parameters, "of the function that is replaced"

    async def slow(**arguments: Any) -> Any:
        await asyncio.sleep(seconds)
        result = answer(**arguments)
        return await result if asyncio.iscoroutine(result) else result

    tool.fn = slow
    return tool


async def measure(bench: Bench, workflow: Workflow, rounds: int) -> dict[str, list[Run]]:
    """Runs of each way, one a round; the first of several rounds does not count. Exits if their results differ."""
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    num_warm_up = 1 if rounds > 1 else 0
    for number in range(rounds + num_warm_up):
        shift = number % len(WAYS)
        this = {way: await bench.run(workflow, way) for way in WAYS[shift:] + WAYS[:shift]}
        for way, run in this.items():
            if run.result != this["treadle"].result or run.num_decoded != this["treadle"].num_decoded:
                sys.exit(f"{workflow.name}: {way} gave {run}, treadle {this['treadle']}")
            if number >= num_warm_up:
                runs[way].append(run)
    return runs


def add_figures(report: Report, workflow: Workflow, runs: dict[str, list[Run]]) -> None:
    """The ratios of both baselines to Treadle."""
    one = runs["treadle"][0]
    common: dict[str, Parameter] = {"workflow": workflow.name, "batch": one.num_calls, "new_tokens": one.num_decoded}
    common |= {"tool_seconds": workflow.tool_seconds}
    for way, suffix in (("gather", ""), ("sequential", "_sequential")):
        pairs = list(zip(runs[way], runs["treadle"], strict=True))
        seconds: dict[str, Parameter] = {
            f"{name}_seconds": round(statistics.median(run.seconds for run in runs[name]), 4)
            for name in ("treadle", way)
        }
        ratios = [other.seconds / ours.seconds for other, ours in pairs]
        seconds |= {"lowest": round(min(ratios), 6), "highest": round(max(ratios), 6)}
        report.add(f"completion_ratio{suffix}", statistics.median(ratios), "x", **common, **seconds)
        tokens: dict[str, Parameter] = {
            f"{name}_prefilled": statistics.median_low(run.num_prefilled for run in runs[name])
            for name in ("treadle", way)
        }
        ratio = statistics.median(other.num_prefilled / ours.num_prefilled for other, ours in pairs)
        report.add(f"prefill_ratio{suffix}", ratio, "x", **common, **tokens)


async def run_all(args: argparse.Namespace, report: Report, rounds: int) -> None:
    async with open_bench(args.model, EngineConfig(dtype=args.dtype, num_threads=args.threads)) as bench:
        for workflow in workflows():
            if workflow.name in QUICK if args.quick else args.workflow in workflow.name:
                add_figures(report, workflow, await measure(bench, workflow, rounds))


def main() -> None:
    options = parser((__doc__ or "").partition("\n")[0])
    options.add_argument("--model", default="smollm2", help="name or path of a model with a tokenizer")
    options.add_argument("--dtype", choices=DTYPES, default="float32", help="element type (default: float32)")
    options.add_argument("--threads", type=int, help="threads for tensor operations (default: torch's)")
    options.add_argument("--workflow", default="", help="only those with this in their name")
    options.add_argument("--rounds", type=int, default=ROUNDS, help=f"runs of each way (default: {ROUNDS})")
    args = options.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = str(torch_dtype(args.dtype)).removeprefix("torch.")
    rounds = 1 if args.quick else args.rounds
    common = {"model": args.model, "dtype": dtype, "threads": torch.get_num_threads(), "repeats": rounds}
    report = Report(common, as_json=args.json)
    asyncio.run(run_all(args, report, rounds))
    report.finish()


if __name__ == "__main__":
    main()
