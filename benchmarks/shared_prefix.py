"""What it is worth to attend to a shared prefix once: decode tokens a second of its branches, with cascade on and off.

    python benchmarks/shared_prefix.py --model smollm2

One call computes the prefix. Then branches begin with its cached pages, add 32 tokens of their own and generate 32,
greedily; all are random tokens. Decoding is timed from the step in which the last branch got its first token to the
step in which the last one got its last. Two engines, one with cascade and one without, take turns, and change who is
first; each figure is the median of the rounds, after one warm-up, and the ratio is that of a round.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from report import Parameter, Report, parser

from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.config import DEVICES, DTYPES, DeviceName, EngineConfig, torch_dtype
from treadle.runtime.engine.engine import Engine
from treadle.runtime.loading import open_model
from treadle.runtime.models.config import WEIGHTS
from treadle.scheduler import CallFinished, Event, OpenProgram, SamplingParams, SubmitCall, TokensOut

BRANCHES: dict[DeviceName, tuple[int, ...]] = {"cpu": (4, 8, 16), "cuda": (4, 16, 64)}
PREFIXES = (512, 1500, 4096)
OWN, NEW = 32, 32
PAGE = 16
ROUNDS = 5
PROGRAM = "benchmark"
GREEDY = SamplingParams(temperature=0)


class Tree:
    """An engine, a prefix in its cache, and branches that begin with it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._prefix: tuple[int, ...] = ()
        self._num_calls = 0
        engine.apply([OpenProgram(PROGRAM)])

    def grow(self, prefix: tuple[int, ...]) -> None:
        """Computes a prefix."""
        self._prefix = prefix
        self._submit([prefix], 1)
        while not any(isinstance(event, CallFinished) for event in self._step()):
            pass

    def branch(self, suffixes: Sequence[tuple[int, ...]], new_tokens: int) -> float:
        """Tokens a second of calls that go on with these tokens after the prefix, while all of them decode."""
        self._submit([self._prefix + suffix for suffix in suffixes], new_tokens)
        counts: dict[str, int] = {}
        num_finished, began, tokens_before = 0, 0.0, 0
        while num_finished < len(suffixes):
            for event in self._step():
                if isinstance(event, TokensOut):
                    counts[event.call_id] = counts.get(event.call_id, 0) + len(event.token_ids)
                elif isinstance(event, CallFinished):
                    self._check_cached(event)
                    num_finished += 1
            if not began and len(counts) == len(suffixes):
                began, tokens_before = time.perf_counter(), sum(counts.values())
        return (sum(counts.values()) - tokens_before) / (time.perf_counter() - began)

    def _check_cached(self, event: CallFinished) -> None:
        assert event.usage.cached >= len(self._prefix) // PAGE * PAGE, "the prefix was not in the cache"

    def _submit(self, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> None:
        for prompt in prompts:
            self._num_calls += 1
            events = self._engine.apply([SubmitCall(f"call-{self._num_calls}", PROGRAM, prompt, GREEDY, new_tokens)])
            assert not events, events

    def _step(self) -> list[Event]:
        events = self._engine.step()
        assert events is not None, "the engine has nothing to do"
        assert all(event.error is None for event in events if isinstance(event, CallFinished)), events
        return events


def measure(args: argparse.Namespace, report: Report, rounds: int) -> None:
    """Rates and ratios. Prefixes that the model's context cannot hold are left out."""
    checkpoint, _ = open_model(args.model, pull=True)
    # Two engines share the memory: each gets four times the pages that its largest tree has.
    num_pages = 4 * (max(PREFIXES) + max(BRANCHES[args.device]) * (OWN + NEW)) // PAGE
    config = EngineConfig(
        device=args.device,
        dtype=args.dtype,
        weights=args.weights,
        num_threads=args.threads,
        num_pages=num_pages,
        page_size=PAGE,
    )
    engines = {on: build_engine(checkpoint, None, replace(config, cascade=on)) for on in (True, False)}
    trees = {on: Tree(engine) for on, engine in engines.items()}
    noise, vocabulary = random.Random(0), range(checkpoint.config.vocab_size)
    new = 8 if args.quick else NEW
    for length in (512,) if args.quick else PREFIXES:
        if length + OWN + new > engines[True].scheduler.limits.max_context:
            continue
        prefix = tuple(noise.choices(vocabulary, k=length))
        for tree in trees.values():
            tree.grow(prefix)
        for count in (4,) if args.quick else BRANCHES[args.device]:
            rates: dict[bool, list[float]] = {True: [], False: []}
            for number in range(rounds + 1):
                suffixes = [tuple(noise.choices(vocabulary, k=OWN)) for _ in range(count)]
                for on in (True, False) if number % 2 else (False, True):
                    rates[on].append(trees[on].branch(suffixes, new))
            sizes: dict[str, Parameter] = {
                "batch": count,
                "prefix_tokens": length,
                "own_tokens": OWN,
                "new_tokens": new,
            }
            add_figures(report, {on: found[1:] for on, found in rates.items()}, sizes)


def add_figures(report: Report, rates: dict[bool, list[float]], sizes: dict[str, Parameter]) -> None:
    """Both rates, and the ratio with its lowest and highest."""
    for cascade, found in rates.items():
        report.add("decode_tokens_per_second", statistics.median(found), "tokens/s", **sizes, cascade=cascade)
    ratios = [on / off for on, off in zip(rates[True], rates[False], strict=True)]
    spread: dict[str, Parameter] = {"lowest": round(min(ratios), 6), "highest": round(max(ratios), 6)}
    report.add("cascade_ratio", statistics.median(ratios), "x", **sizes, **spread)


def main() -> None:
    options = parser((__doc__ or "").partition("\n")[0])
    options.add_argument("--model", default="smollm2", help="name, path or random:SHAPE (default: smollm2)")
    options.add_argument("--device", choices=DEVICES, default="cpu", help="where the model runs (default: cpu)")
    options.add_argument("--dtype", choices=DTYPES, default="auto", help="element type (default: auto)")
    options.add_argument("--weights", choices=WEIGHTS, default="auto", help="which are in 4 bits (default: auto)")
    options.add_argument("--threads", type=int, help="threads for tensor operations (default: torch's)")
    options.add_argument("--rounds", type=int, default=ROUNDS, help=f"that count (default: {ROUNDS})")
    args = options.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rounds = 1 if args.quick else args.rounds
    common: dict[str, Parameter] = {"model": args.model, "device": args.device, "weights": args.weights}
    common |= {"dtype": str(torch_dtype(args.dtype, args.device)).removeprefix("torch.")}
    common |= {"threads": torch.get_num_threads(), "repeats": rounds}
    report = Report(common, as_json=args.json)
    measure(args, report, rounds)
    report.finish()


if __name__ == "__main__":
    main()
