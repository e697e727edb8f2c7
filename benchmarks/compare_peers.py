"""Treadle's engine beside other engines: on the same machine, with the same model and the same token ids.

    python benchmarks/compare_peers.py --model smollm2 --peer vllm=/path/to/python --peer llama-cpp=/path/to/python

Nothing of a peer is installed with Treadle: each runs in the interpreter that has it, as Treadle does in this one,
behind an adapter of `peers/` that takes token ids on standard input. A workload is run by Treadle and by the peer in
turn, and whoever is not asked is stopped meanwhile. A ratio is the median of those of the rounds, with the lowest and
the highest of them beside it; above 1, Treadle is faster. What is done:

    decode    some sequences at once; from the last one's first token to the last token
    prefill   one prompt, to its first token
    agents    some that start together from one prefix, whose turns read all before and the result of a tool that takes
              no time; until the last has ended, with the prefix cache on
    start     a new process, to the first token after five

Every prompt is new in every round, so that a cache finds what a workload shares within itself and nothing else.
Sampling is greedy, and nothing ends a sequence but its length. The first round of a workload does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers.export import export_model
from peers.process import ADAPTERS, PeerError, PeerProcess, first_token_seconds
from peers.serving import Settings
from report import Parameter, Report, parser

from treadle.runtime.engine.config import DTYPES, torch_dtype
from treadle.runtime.loading import fetch_if_missing, open_model
from treadle.runtime.models.config import WEIGHTS

BATCHES = (1, 4, 16, 64)
DECODE_PROMPT, DECODE_NEW = 64, 128
PREFILLS = (512, 2048)
START_PROMPT = 5
ROUNDS = 5
START_ROUNDS = 3
LIMIT_S = 900.0
MAX_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class AgentShape:
    """How many agents there are, and the tokens of what they read and write."""

    agents: int
    prefix: int
    turns: int
    result: int
    new_tokens: int


AGENTS = AgentShape(agents=8, prefix=1500, turns=6, result=200, new_tokens=32)
QUICK_AGENTS = AgentShape(agents=2, prefix=64, turns=2, result=16, new_tokens=4)


@dataclass(frozen=True, slots=True)
class Side:
    """An engine, its process, and what it says about itself."""

    name: str
    python: str
    settings: Settings
    process: PeerProcess
    version: str
    precision: str


@dataclass(frozen=True, slots=True)
class Workload:
    """Something to be done by both sides.

    Attributes:
        prompts: Makes what a round asks of both sides.
        run: Does it on one side, and returns what `measure` says.
        measure: `tokens_per_second`, of which more is better, or `seconds`.
        parameters: Of the figure.
    """

    figure: str
    prompts: Callable[[], Any]
    run: Callable[[Side, Any], float]
    measure: str
    parameters: dict[str, Parameter]


class Prompts:
    """Token ids that nobody has seen before."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self._vocab_size = vocab_size
        self._random = random.Random(seed)

    def some(self, count: int, length: int) -> list[list[int]]:
        """So many prompts of one length."""
        return [[self._random.randrange(self._vocab_size) for _ in range(length)] for _ in range(count)]

    def decode(self, batch: int, prompt: int, new: int) -> Workload:
        def run(side: Side, prompts: list[list[int]]) -> float:
            answer = side.process.ask("complete", prompts=prompts, new_tokens=new)
            assert answer["tokens"] == batch * new, f"{side.name} ended early"
            return float(answer["decode_tokens"] / answer["decode_seconds"])

        parameters: dict[str, Parameter] = {"batch": batch, "prompt_tokens": prompt, "new_tokens": new}
        return Workload("decode_ratio", lambda: self.some(batch, prompt), run, "tokens_per_second", parameters)

    def prefill(self, tokens: int) -> Workload:
        def run(side: Side, prompts: list[list[int]]) -> float:
            return float(tokens / side.process.ask("complete", prompts=prompts, new_tokens=1)["seconds"])

        parameters: dict[str, Parameter] = {"tokens": tokens, "batch": 1, "new_tokens": 1}
        return Workload("prefill_ratio", lambda: self.some(1, tokens), run, "tokens_per_second", parameters)

    def agents(self, shape: AgentShape) -> Workload:
        def prompts() -> dict[str, Any]:
            (prefix,) = self.some(1, shape.prefix)
            results = [self.some(shape.turns, shape.result) for _ in range(shape.agents)]
            return {"prefix": prefix, "results": results, "new_tokens": shape.new_tokens}

        def run(side: Side, request: dict[str, Any]) -> float:
            answer = side.process.ask("agents", **request)
            assert answer["tokens"] == shape.agents * shape.turns * shape.new_tokens, f"{side.name} ended early"
            return float(answer["seconds"])

        parameters: dict[str, Parameter] = {"batch": shape.agents, "turns": shape.turns, "new_tokens": shape.new_tokens}
        parameters |= {"prefix_tokens": shape.prefix, "result_tokens": shape.result}
        return Workload("agents_ratio", prompts, run, "seconds", parameters)

    def start(self, limit_s: float) -> Workload:
        def run(side: Side, prompts: list[list[int]]) -> float:
            return first_token_seconds(side.name, side.python, side.settings, prompts[0], limit_s)

        parameters: dict[str, Parameter] = {"batch": 1, "prompt_tokens": START_PROMPT, "new_tokens": 1}
        return Workload("start_ratio", lambda: self.some(1, START_PROMPT), run, "seconds", parameters)


class Models:
    """One model, in the form that each engine takes; forms that are not there are written into `folder`."""

    def __init__(self, model: str, folder: Path) -> None:
        fetch_if_missing(model, lambda *_: None)
        self._checkpoint, _ = open_model(model, pull=True)
        self._name = model
        self._folder = folder
        self.vocab_size = self._checkpoint.config.vocab_size
        self.max_context = min(self._checkpoint.config.max_context, MAX_CONTEXT)

    def form(self, engine: str) -> str:
        """The file, folder or name that an engine takes. Exits if it has none."""
        path = self._checkpoint.path
        if engine == "treadle":
            return str(path.absolute()) if path is not None else self._name
        if engine == "llama-cpp":
            if path is None or path.suffix != ".gguf":
                sys.exit(f"llama-cpp runs .gguf files, and {self._name} is none; compare it with other peers")
            return str(path.absolute())
        if path is not None and path.is_dir():
            return str(path.absolute())
        if not any(self._folder.iterdir()):
            export_model(self._checkpoint, self._folder)
        return str(self._folder)


def workloads(args: argparse.Namespace, models: Models) -> list[Workload]:
    """Everything that fits into the model's context, small with `--quick`."""
    prompts = Prompts(models.vocab_size)
    batches, prompt, new = ((1, 4), 16, 8) if args.quick else (BATCHES, DECODE_PROMPT, DECODE_NEW)
    shape = QUICK_AGENTS if args.quick else AGENTS
    found = [prompts.decode(batch, prompt, new) for batch in batches]
    found += [prompts.prefill(tokens) for tokens in ((128,) if args.quick else PREFILLS) if tokens < models.max_context]
    if shape.prefix + shape.turns * (shape.result + shape.new_tokens) <= models.max_context:
        found.append(prompts.agents(shape))
    return [work for work in [*found, prompts.start(args.limit)] if args.workload in work.figure]


def compare(work: Workload, ours: Side, theirs: Side, rounds: int) -> list[tuple[float, float]]:
    """What both sides measured, ours first, in each round but the first of several."""
    pairs = []
    for _ in range(rounds + (rounds > 1)):
        prompts = work.prompts()
        pairs.append((work.run(ours, prompts), work.run(theirs, prompts)))
    return pairs[-rounds:]


def add_figure(report: Report, work: Workload, theirs: Side, ours: Side, pairs: Sequence[tuple[float, float]]) -> None:
    """The median ratio of the rounds, its range, and both sides' medians."""
    more_is_better = work.measure == "tokens_per_second"
    ratios = [mine / other if more_is_better else other / mine for mine, other in pairs]
    ranges: dict[str, Parameter] = {"lowest": round(min(ratios), 6), "highest": round(max(ratios), 6)}
    medians: dict[str, Parameter] = {
        f"{side}_{work.measure}": round(statistics.median(values), 6)
        for side, values in zip(("treadle", "peer"), zip(*pairs, strict=True), strict=True)
    }
    about: dict[str, Parameter] = {
        "treadle_precision": ours.precision,
        "peer_precision": theirs.precision,
        "peer_version": theirs.version,
        "rounds": len(pairs),
    }
    report.add(
        work.figure, statistics.median(ratios), "x", peer=theirs.name, **work.parameters, **ranges, **medians, **about
    )


@contextlib.contextmanager
def opened(name: str, python: str, args: argparse.Namespace, models: Models) -> Iterator[Side]:
    """An engine with the model loaded, closed with the scope."""
    settings = Settings(models.form(name), args.threads, models.max_context, max(BATCHES), args.dtype, args.weights)
    with PeerProcess(name, python, settings, args.limit) as process:
        about = process.open()
        yield Side(name, python, settings, process, about["version"], about["precision"])


def run_all(args: argparse.Namespace, report: Report) -> None:
    """Every workload against every peer."""
    with tempfile.TemporaryDirectory() as folder:
        models = Models(args.model, Path(folder))
        with opened("treadle", sys.executable, args, models) as ours:
            for name, python in args.peer:
                with opened(name, python, args, models) as theirs:
                    for work in workloads(args, models):
                        rounds = START_ROUNDS if work.figure == "start_ratio" else args.rounds
                        pairs = compare(work, ours, theirs, 1 if args.quick else rounds)
                        add_figure(report, work, theirs, ours, pairs)


def peer(text: str) -> tuple[str, str]:
    """The name and interpreter of `--peer NAME=PYTHON`."""
    name, _, python = text.partition("=")
    if name not in ADAPTERS:
        raise argparse.ArgumentTypeError(f"no peer is called {name!r}; choose one of {', '.join(ADAPTERS)}")
    found = shutil.which(python)
    if found is None:
        raise argparse.ArgumentTypeError(f"{python!r} is no program; write {name}=PYTHON, where {name} is installed")
    return name, os.path.abspath(found)


def main() -> None:
    options = parser((__doc__ or "").partition("\n")[0])
    options.add_argument("--model", default="smollm2", help="name, path or random:SHAPE (default: smollm2)")
    options.add_argument("--peer", type=peer, action="append", metavar="NAME=PYTHON", help="may be repeated")
    options.add_argument("--dtype", choices=DTYPES, default="auto", help="Treadle's element type (default: auto)")
    options.add_argument("--weights", choices=WEIGHTS, default="auto", help="which of Treadle's are in 4 bits")
    options.add_argument("--threads", type=int, help="threads of every engine (default: torch's choice)")
    options.add_argument("--workload", default="", help="only those with this in the name of their figure")
    options.add_argument("--rounds", type=int, default=ROUNDS, help=f"that count, of each workload (default: {ROUNDS})")
    options.add_argument("--limit", type=float, default=LIMIT_S, help="most seconds for an answer")
    args = options.parse_args()
    args.threads = args.threads or torch.get_num_threads()
    args.peer = args.peer or [("transformers", sys.executable)]
    dtype = str(torch_dtype(args.dtype)).removeprefix("torch.")
    report = Report(
        {"model": args.model, "dtype": dtype, "weights": args.weights, "threads": args.threads}, as_json=args.json
    )
    # Peers end with the scopes that opened them, whatever ends this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run_all(args, report)
    except PeerError as error:
        sys.exit(f"compare_peers: {error}")
    report.finish()


if __name__ == "__main__":
    main()
