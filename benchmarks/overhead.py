"""What Python costs in a step: microseconds of all that is not tensor work, by batch, and their share of the step.

    python benchmarks/overhead.py --model random:tiny-llama      the floor: a model that computes next to nothing
    python benchmarks/overhead.py --model smollm2 --text         the share of a real model's step

The parts of `Engine.step` are timed from outside, each without the parts within it; what is in none is `rest`. On a CPU
`forward` (the decoder) and `choose` are tensor work. A GPU works on its own: there all is Python's but `wait`, the time
in which the host waits for it. Those steps count in which the whole batch decodes, and each figure is their median, so
that the parts add up only roughly. The timers themselves cost about a microsecond a part, and `text` is one a token.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from report import Parameter, Report, parser

from treadle.runtime.engine import runner
from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.config import DEVICES, DTYPES, DeviceName, EngineConfig, torch_dtype
from treadle.runtime.engine.engine import Engine
from treadle.runtime.engine.text import TextStream
from treadle.runtime.loading import open_model
from treadle.runtime.models.config import WEIGHTS
from treadle.scheduler import CallFinished, OpenProgram, SamplingParams, SubmitCall, TokensOut

BATCHES = (1, 4, 16, 64)
PROMPT, NEW = 64, 64
PROGRAM = "benchmark"
GREEDY = SamplingParams(temperature=0)
NOT_PYTHON: dict[DeviceName, tuple[str, ...]] = {"cpu": ("forward", "choose"), "cuda": ("wait",)}


class Stopwatch:
    """Seconds in parts of a program, each without the parts that run within it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._within = 0.0

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Times a function of an object, class or module as a part."""
        setattr(owner, name, self.timed(getattr(owner, name), part))

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, timed as a part."""

        def run(*args: Any, **named: Any) -> Any:
            outside, self._within = self._within, 0.0
            began = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                elapsed = time.perf_counter() - began
                self.seconds[part] += elapsed - self._within
                self._within = outside + elapsed

        return run


def watched(engine: Engine) -> Stopwatch:
    """Times what an engine's step is made of."""
    watch, device = Stopwatch(), engine.runner.device
    for owner, name, part in (
        (engine, "step", "rest"),
        (engine.scheduler, "plan", "plan"),
        (engine.runner.state, "write", "write"),
        (engine.runner, "forward", "launch"),
        (runner, "lay_out", "layout"),
        (engine.runner, "_attention", "attention"),
        (engine.runner.decoder, "forward", "forward"),
        (engine.runner, "sample", "sample"),
        (engine.runner, "collect", "collect"),
        (type(device.record()), "wait", "wait"),
        (TextStream, "push", "text"),
        (engine.scheduler, "complete", "complete"),
    ):
        watch.watch(owner, name, part)
    device.ops = replace(device.ops, choose=watch.timed(device.ops.choose, "choose"))
    return watch


class Batches:
    """An engine, and the times of its steps."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self._engine = engine
        self._watch = watched(engine)
        self._random = random.Random(0)
        self._vocabulary = range(vocab_size)
        self._num_calls = 0
        engine.apply([OpenProgram(PROGRAM)])

    def steps(self, batch: int, prompt_tokens: int, new_tokens: int) -> Iterator[dict[str, float]]:
        """Seconds of each part, of the steps between the first token of the last call and the end of the first one."""
        for _ in range(batch):
            self._num_calls += 1
            prompt = tuple(self._random.choices(self._vocabulary, k=prompt_tokens))
            self._engine.apply([SubmitCall(f"call-{self._num_calls}", PROGRAM, prompt, GREEDY, new_tokens)])
        started: set[str] = set()
        num_finished = 0
        while num_finished < batch:
            all_started = len(started) == batch
            self._watch.seconds.clear()
            events = self._engine.step()
            assert events is not None, "the engine has nothing to do"
            for event in events:
                if isinstance(event, TokensOut):
                    started.add(event.call_id)
                elif isinstance(event, CallFinished):
                    assert event.error is None, event
                    num_finished += 1
            if all_started and not num_finished:
                yield dict(self._watch.seconds)


def measure(args: argparse.Namespace, report: Report) -> None:
    """The figures of each batch, which runs once before to warm up."""
    checkpoint, tokenizer = open_model(args.model, pull=True)
    if args.text and tokenizer is None:
        sys.exit(f"{args.model} has no tokenizer; leave out --text, or take another model, such as smollm2")
    config = EngineConfig(device=args.device, dtype=args.dtype, weights=args.weights, num_threads=args.threads)
    engine = build_engine(checkpoint, tokenizer if args.text else None, config)
    work = Batches(engine, checkpoint.config.vocab_size)
    batches, prompt, new = ((1, 4), 16, 8) if args.quick else (BATCHES, PROMPT, NEW)
    for batch in batches:
        list(work.steps(batch, prompt, new))
        steps = list(work.steps(batch, prompt, new))
        sizes: dict[str, Parameter] = {"batch": batch, "prompt_tokens": prompt, "new_tokens": new, "steps": len(steps)}
        add_figures(report, steps, NOT_PYTHON[args.device], sizes)


def add_figures(
    report: Report, steps: Sequence[dict[str, float]], not_python: Sequence[str], sizes: dict[str, Parameter]
) -> None:
    """Medians of whole steps, of what Python takes of them, and of each part."""
    totals = [sum(parts.values()) for parts in steps]
    python = [sum(seconds for part, seconds in parts.items() if part not in not_python) for parts in steps]
    shares = [some / total for some, total in zip(python, totals, strict=True)]
    report.add("step", 1e6 * statistics.median(totals), "us", **sizes)
    report.add("python", 1e6 * statistics.median(python), "us", **sizes)
    report.add("python_share", 100 * statistics.median(shares), "%", **sizes)
    for part in steps[0]:
        value = statistics.median(parts.get(part, 0.0) for parts in steps)
        report.add("part", 1e6 * value, "us", **sizes, part=part)


def main() -> None:
    options = parser((__doc__ or "").partition("\n")[0])
    options.add_argument("--model", default="smollm2", help="name, path or random:SHAPE (default: smollm2)")
    options.add_argument("--text", action="store_true", help="make text of the tokens, if the model has a tokenizer")
    options.add_argument("--device", choices=DEVICES, default="cpu", help="where the model runs (default: cpu)")
    options.add_argument("--dtype", choices=DTYPES, default="auto", help="element type (default: auto)")
    options.add_argument("--weights", choices=WEIGHTS, default="auto", help="which are in 4 bits (default: auto)")
    options.add_argument("--threads", type=int, help="threads for tensor operations (default: torch's)")
    args = options.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    common: dict[str, Parameter] = {"model": args.model, "device": args.device, "weights": args.weights}
    common |= {"dtype": str(torch_dtype(args.dtype, args.device)).removeprefix("torch.")}
    common |= {"threads": torch.get_num_threads(), "text": args.text}
    report = Report(common, as_json=args.json)
    measure(args, report)
    report.finish()


if __name__ == "__main__":
    main()
