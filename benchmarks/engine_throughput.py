"""How fast the engine is: decode and prefill tokens a second, and seconds from process start to the first text.

    python benchmarks/engine_throughput.py --model smollm2

Every prompt is different and the prefix cache has nothing to find; sampling is greedy; nothing ends a call but its
length. Each figure is the median of three runs after one warm-up. Decoding is timed from the step in which the last
row got its first token to the step in which the last row got its last, so no prefill is in it.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
from report import Report, parser

from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.config import DTYPES, EngineConfig, torch_dtype
from treadle.runtime.engine.engine import Engine
from treadle.runtime.loading import open_model
from treadle.runtime.models.config import WEIGHTS
from treadle.scheduler import CallFinished, OpenProgram, SamplingParams, SubmitCall, TokensOut

BATCHES = (1, 4, 16, 64)
DECODE_PROMPT, DECODE_NEW = 64, 128
PREFILLS = (512, 2048)
REPEATS = 3
START_PROMPT = "The capital of France is"
PROGRAM = "benchmark"


class Workload:
    """An engine, and calls on it that share nothing."""

    def __init__(self, engine: Engine, vocab_size: int, seed: int = 0) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self._num_calls = 0
        engine.apply([OpenProgram(PROGRAM)])

    def _calls(self, count: int, prompt_tokens: int, new_tokens: int) -> list[SubmitCall]:
        while self._engine.touch_ahead():  # as the thread that turns an engine does between requests
            pass
        calls = []
        for _ in range(count):
            self._num_calls += 1
            tokens = tuple(self._random.randrange(self._vocab_size) for _ in range(prompt_tokens))
            calls.append(
                SubmitCall(f"call-{self._num_calls}", PROGRAM, tokens, SamplingParams(temperature=0), new_tokens)
            )
        return calls

    def decode(self, batch: int, prompt_tokens: int, new_tokens: int) -> float:
        """Tokens a second of `batch` rows together, all of them decoding."""
        self._submit(self._calls(batch, prompt_tokens, new_tokens))
        counts: dict[str, int] = {}
        num_finished, began, tokens_before = 0, 0.0, 0
        while num_finished < batch:
            for event in self._step():
                if isinstance(event, TokensOut):
                    counts[event.call_id] = counts.get(event.call_id, 0) + len(event.token_ids)
                num_finished += isinstance(event, CallFinished)
            if not began and len(counts) == batch:
                began, tokens_before = time.perf_counter(), sum(counts.values())
        seconds = time.perf_counter() - began
        return (batch * new_tokens - tokens_before) / seconds

    def prefill(self, prompt_tokens: int) -> float:
        """Prompt tokens a second of one call, up to its first token."""
        calls = self._calls(1, prompt_tokens, 1)
        start = time.perf_counter()
        self._submit(calls)
        while not any(isinstance(event, CallFinished) for event in self._step()):
            pass
        return prompt_tokens / (time.perf_counter() - start)

    def _submit(self, calls: Sequence[SubmitCall]) -> None:
        events = self._engine.apply(calls)
        assert not events, events

    def _step(self) -> Sequence[object]:
        events = self._engine.step()
        assert events is not None, "the engine has nothing to do"
        for event in events:
            assert not isinstance(event, CallFinished) or event.error is None, event
            assert not isinstance(event, CallFinished) or event.usage.cached == 0, "the prefix cache had a hit"
        return events


def first_token_seconds(args: argparse.Namespace) -> float:
    """From the start of a `treadle generate` process to the first byte that it prints."""
    command = [sys.executable, "-m", "treadle.runtime.cli.main", "generate", "--model", args.model, "--max-tokens", "1"]
    command += [
        "--dtype",
        args.dtype,
        "--weights",
        args.weights,
        *(["--threads", str(args.threads)] if args.threads else []),
    ]
    # A model without a tokenizer takes and gives token ids.
    command += ["--ids", "1 2 3 4 5"] if args.model.startswith("random:") else [START_PROMPT]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    if process.returncode != 0 or not first:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return seconds


def median(measure: Callable[[], float], repeats: int, *, warm_up: bool = True) -> float:
    """The median of some measurements, after one that does not count."""
    if warm_up:
        measure()
    return statistics.median(measure() for _ in range(repeats))


def measure_engine(args: argparse.Namespace, report: Report, repeats: int) -> None:
    """Decode and prefill figures. Sizes that the model's context cannot hold are left out."""
    checkpoint, _ = open_model(args.model, pull=True)
    # Nothing is to be found in the tree, but pages go through it as they do in service.
    config = EngineConfig(dtype=args.dtype, weights=args.weights, num_threads=args.threads)
    engine = build_engine(checkpoint, None, config)
    work = Workload(engine, checkpoint.config.vocab_size)
    batches, prompt, new = ((1, 4), 16, 8) if args.quick else (BATCHES, DECODE_PROMPT, DECODE_NEW)
    for batch in batches:
        value = median(lambda batch=batch: work.decode(batch, prompt, new), repeats)  # type: ignore[misc]
        report.add("decode_tokens_per_second", value, "tokens/s", batch=batch, prompt_tokens=prompt, new_tokens=new)
    for size in (128,) if args.quick else PREFILLS:
        if size < engine.scheduler.limits.max_context:
            value = median(lambda size=size: work.prefill(size), repeats)  # type: ignore[misc]
            report.add("prefill_tokens_per_second", value, "tokens/s", batch=1, prompt_tokens=size, new_tokens=1)


def main() -> None:
    options = parser((__doc__ or "").partition("\n")[0])
    options.add_argument("--model", default="smollm2", help="name, path or random:SHAPE (default: smollm2)")
    options.add_argument("--dtype", choices=DTYPES, default="auto", help="element type (default: auto)")
    options.add_argument("--weights", choices=WEIGHTS, default="auto", help="which are in 4 bits (default: auto)")
    options.add_argument("--threads", type=int, help="threads for tensor operations (default: torch's)")
    args = options.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = str(torch_dtype(args.dtype)).removeprefix("torch.")
    repeats = 1 if args.quick else REPEATS
    common = {"model": args.model, "dtype": dtype, "weights": args.weights, "threads": torch.get_num_threads()}
    common["repeats"] = repeats
    report = Report(common, as_json=args.json)
    measure_engine(args, report, repeats)
    # The first process also brings the files into memory: it is the warm-up.
    value = median(lambda: first_token_seconds(args), repeats)
    report.add("start_to_first_token_seconds", value, "s", batch=1, prompt=START_PROMPT, new_tokens=1)
    report.finish()


if __name__ == "__main__":
    main()
