"""What the steps of an engine cost on this machine: times of many kinds of step, and the line through them.

    python benchmarks/calibrate.py --model smollm2 --out scheduler/simulator/engines/cpu-smollm2.json

The steps are those of the real engine, scheduling and sampling included: decoding rows at several contexts, prefill of
several lengths at several positions, and both at once. `--out` writes a file that `treadle simulate --engine` takes.
Weights are in full, by torch: codes cost a step of more than 8 tokens something else, which no line through them tells.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path

import torch
from live.calibration import TIMERS, Fit, fit, measure_copies, measure_steps
from report import Parameter, Report, machine, parser

from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.config import DTYPES, EngineConfig, kv_bytes_per_token, torch_dtype
from treadle.runtime.engine.engine import Engine
from treadle.runtime.loading import open_model
from treadle.scheduler.simulator import CopyCost, Hardware

FITTED = {
    "fixed_s": ("ms", 1e3),
    "per_token_s": ("us", 1e6),
    "per_pair_s": ("ns", 1e9),
    "per_context_token_s": ("us", 1e6),
}


def hardware_of(engine: Engine, name: str, found: Fit, copies: CopyCost, source: str) -> Hardware:
    """The engine as the simulator takes it."""
    config, decoder = engine.scheduler.config, engine.runner.decoder
    size = kv_bytes_per_token(decoder.config, decoder.dtype)
    return Hardware(
        name, size, config.max_step_tokens, config.num_slots, found.step, copies, source=source, validated=False
    )


def source_text(args: argparse.Namespace, dtype: str, count: int, found: Fit) -> str:
    """Where the numbers come from, in words."""
    here = machine()
    return (
        f"Fitted on steps of Treadle's own engine with {args.model} in {dtype}, torch {here['torch']} with "
        f"{torch.get_num_threads()} threads, on {here['cores']} cores of {here['cpu']} ({platform.machine()}): {count} "
        f"steps (decoding rows, prefill of ever new lengths, both at once) by {args.clock} time; least squares of "
        f"relative errors, of which the mean is {found.mean_error:.1%} and the largest {found.largest_error:.1%}. Load "
        f"average at the end: {os.getloadavg()[0]:.1f}. Copies: between two arenas in the same memory. Made by "
        f"benchmarks/calibrate.py."
    )


def calibrate(args: argparse.Namespace) -> None:
    """Measures, fits, prints and writes."""
    checkpoint, _ = open_model(args.model, pull=True)
    dtype = str(torch_dtype(args.dtype)).removeprefix("torch.")
    engine = build_engine(
        checkpoint, None, EngineConfig(dtype=args.dtype, weights="full", native=False, num_threads=args.threads)
    )
    common: dict[str, Parameter] = {"model": args.model, "dtype": dtype, "threads": torch.get_num_threads()}
    common["clock"] = args.clock
    report, samples = Report(common, as_json=args.json), []
    for sample in measure_steps(engine, checkpoint.config.vocab_size, TIMERS[args.clock], quick=args.quick):
        samples.append(sample)
        work = {"batch": sample.work.rows, "new_tokens": sample.work.new_tokens}
        more = {"pairs": sample.work.pairs, "context": sample.work.context}
        report.add("step", sample.seconds * 1e3, "ms", **work, **more)
    found, copies = fit(samples), measure_copies(engine, TIMERS[args.clock], quick=args.quick)
    counts: dict[str, Parameter] = {"batch": 0, "new_tokens": 0, "steps": len(samples)}
    for name, (unit, factor) in FITTED.items():
        report.add(name, getattr(found.step, name) * factor, unit, **counts)
    report.add("copy", copies.bytes_per_s_to_host / 1e9, "GB/s", **counts)
    report.add("copy_fixed", copies.fixed_s * 1e6, "us", **counts)
    report.add("mean_error", found.mean_error * 100, "%", **counts)
    report.add("largest_error", found.largest_error * 100, "%", **counts)
    report.finish()
    if args.out is not None:
        name = args.out.name.removesuffix(".json")
        hardware = hardware_of(engine, name, found, copies, source_text(args, dtype, len(samples), found))
        args.out.write_text(json.dumps(asdict(hardware), indent=2) + "\n", encoding="utf-8")


def main() -> None:
    options = parser((__doc__ or "").partition("\n")[0])
    options.add_argument("--model", default="smollm2", help="name, path or random:SHAPE (default: smollm2)")
    options.add_argument("--dtype", choices=DTYPES, default="auto", help="element type (default: auto)")
    options.add_argument("--threads", type=int, help="threads for tensor operations (default: torch's)")
    text = "wall, or cpu: time of the processor, for one thread on a machine that others use (default: wall)"
    options.add_argument("--clock", choices=tuple(TIMERS), default="wall", help=text)
    options.add_argument("--out", type=Path, metavar="FILE", help="write the costs as a hardware file, named like it")
    calibrate(options.parse_args())


if __name__ == "__main__":
    main()
