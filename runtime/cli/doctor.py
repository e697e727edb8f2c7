"""`treadle doctor`: what is here, what is missing, and what will be slow and why."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from treadle.runtime.cli.machine import Machine, Torch, cpu_features, native_problem, read_machine, read_torch
from treadle.runtime.cli.options import Commands
from treadle.runtime.config import cache_dir
from treadle.runtime.models.registry import ModelListing, installed

SMALL_MEMORY = 4 * 2**30
"""Weights of smollm2 in float32, its KV pool and torch itself take about two thirds of this."""


@dataclass(frozen=True, slots=True)
class Report:
    """All that the command prints. With anything in `missing`, a model cannot be run or kept.

    `native_problem` is why the operations of `native.c` cannot be used; None if they can.
    """

    machine: Machine
    torch: Torch | None
    cache: str
    cache_writable: bool
    native_problem: str | None
    models: list[str]
    missing: list[str]
    slow: list[str]


def add_command(commands: Commands) -> None:
    """Adds `doctor` to the command line."""
    text = "Says what is here, what is missing, and what will be slow and why."
    parser = commands.add_parser("doctor", help="look at this machine", description=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the report; the exit code is 1 if something needed is missing."""
    report = examine()
    if args.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        _print(report)
    return 1 if report.missing else 0


def examine() -> Report:
    """Looks at the machine, torch, the packages and the cache."""
    machine, torch = read_machine(), None
    missing = [f"{name} is not installed: run `make venv`" for name, v in machine.packages.items() if v is None]
    try:
        machine = dataclasses.replace(machine, cpu_features=cpu_features())
        torch = read_torch()
    except (ImportError, OSError) as error:
        missing.append(f"torch cannot be imported: {error}")
    cache = cache_dir()
    listings = installed(cache)
    writable = _is_writable(cache)
    problem = (
        native_problem(cache) if torch is not None and writable else "there is no torch, or no cache to build it in"
    )
    if not writable:
        missing.append(f"{cache} cannot be written to, so no model can be kept: set TREADLE_CACHE to another folder")
    slow = _slow(machine, torch, problem)
    return Report(machine, torch, str(cache), writable, problem, _cached(listings), missing, slow)


def _cached(listings: list[ModelListing]) -> list[str]:
    return [listing.name for listing in listings if listing.cached]


def _is_writable(folder: Path) -> bool:
    """Whether a folder can be written to, or made."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _slow(machine: Machine, torch: Torch | None, native_problem: str | None) -> list[str]:
    reasons = []
    if native_problem is not None and torch is not None and torch.auto_dtype == "bfloat16":
        reasons.append(f"torch computes, two to four times slower than native.c: {native_problem}")
    if machine.gpu is not None:
        reasons.append(f"{machine.gpu} is there: the engine runs on the CPU unless it is told --device cuda")
    if machine.cores_usable < 2:
        reasons.append(f"{machine.cores_usable:g} core: matrices multiply on one core")
    if machine.load_average > machine.cores_usable:
        reasons.append(
            f"other work is running (load average {machine.load_average:.1f} on {machine.cores_usable:g} cores), and "
            "torch's threads spin while they wait: OMP_WAIT_POLICY=passive in the environment lets them sleep"
        )
    if machine.memory < SMALL_MEMORY:
        reasons.append(f"{_gib(machine.memory)} of memory: few KV pages, so less is shared and more computed again")
    if machine.python_is_debug:
        reasons.append("this is a debug build of Python")
    return reasons + (_slow_torch(machine, torch) if torch is not None else [])


def _slow_torch(machine: Machine, torch: Torch) -> list[str]:
    reasons = []
    if torch.is_debug:
        reasons.append("this is a debug build of torch")
    if torch.auto_dtype == "float32":
        reasons.append("no bfloat16 in this CPU, so float32: twice the memory to read for every token")
    elif torch.bfloat16_gflops < torch.float32_gflops:
        reasons.append("bfloat16 measured slower than float32 here: try --dtype float32")
    if torch.threads > machine.cores_usable:
        reasons.append(
            f"{torch.threads} threads on {machine.cores_usable:g} cores wait for each other: "
            f"try --threads {max(1, int(machine.cores_usable))}"
        )
    elif torch.threads < int(machine.cores_usable) and torch.threads < machine.cores // 2:
        reasons.append(f"{torch.threads} threads on {machine.cores_usable:g} cores: try --threads")
    return reasons


def _print(report: Report) -> None:
    machine, torch = report.machine, report.torch
    _line("python", f"{machine.python}, {machine.platform}")
    _line("packages", ", ".join(f"{name} {found or 'MISSING'}" for name, found in machine.packages.items()))
    features = [name for name, there in machine.cpu_features.items() if there]
    _line("cpu", f"{machine.cpu}; {', '.join(features) or 'none of the features that matter'}")
    _line("cores", f"{machine.cores_usable:g} usable of {machine.cores}, load average {machine.load_average:.1f}")
    available = "" if machine.memory_available is None else f", {_gib(machine.memory_available)} available"
    _line("memory", f"{_gib(machine.memory)}{available}")
    _line("gpu", machine.gpu or "none found")
    if torch is not None:
        _line("torch", f"{torch.version}, {torch.blas}, {torch.threads} threads")
        _line("dtype", f"auto is {torch.auto_dtype}: {_dtype_reason(machine, torch)}")
        _line(
            "measured", f"matmul {torch.bfloat16_gflops:.0f} GFLOP/s in bfloat16, {torch.float32_gflops:.0f} in float32"
        )
        _line("", f"memory read at {torch.read_bytes / 1e9:.0f} GB/s")
    _line("native.c", "built" if report.native_problem is None else f"not used: {report.native_problem}")
    _line("cache", f"{report.cache} ({'writable' if report.cache_writable else 'NOT writable'})")
    _line("models", ", ".join(report.models) or "none yet; `treadle models` lists what there is")
    for title, reasons in (("missing", report.missing), ("slow", report.slow)):
        for reason in reasons or ["nothing"]:
            _line(title, reason)


def _dtype_reason(machine: Machine, torch: Torch) -> str:
    if torch.auto_dtype == "float32":
        return "this CPU does not multiply bfloat16 in hardware"
    by = [name for name in ("avx512_bf16", "amx_bf16") if machine.cpu_features.get(name)]
    return f"this CPU multiplies it in hardware ({', '.join(by)})"


def _line(title: str, text: str) -> None:
    print(f"{title:10}{text}")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
