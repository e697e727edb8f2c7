"""`treadle simulate`: what policies would do to recorded programs, on hardware that need not be here."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle.runtime.cli.console import error_console, status
from treadle.runtime.cli.options import Commands
from treadle.runtime.errors import InvalidRequestError
from treadle.scheduler.simulator import Hardware, hardware, presets, traces
from treadle.scheduler.simulator.band import Band, Sample, Study
from treadle.scheduler.simulator.pauses import FORMS
from treadle.scheduler.simulator.report import Point

DEFAULT_POLICIES = ("vllm", "treadle")
DEFAULT_PROGRAMS = 16

EPILOG = f"""
policies: {", ".join(presets.PRESETS)}; or ORDER+RETENTION[+ADMISSION].
engines: {", ".join(hardware.names())}.

  treadle simulate --trace FILE --programs 32 --pool 1M --policy vllm --policy treadle --seeds 5
  treadle simulate --trace FILE --sweep pool=250K,500K,1M,2M --plot band.png
  treadle simulate --trace FILE --per-hour 200 --pool 1M --host 128GB --json
"""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, slots=True)
class Size:
    """An amount of KV: tokens, or bytes."""

    amount: float
    in_bytes: bool

    @classmethod
    def parse(cls, text: str) -> Size:
        """`500000`, `500K` and `1.5M` are tokens; `128GB` and `128GiB` are bytes. Raises `ValueError`."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)(B?)", text.strip(), re.IGNORECASE)
        if match is None or (match[3] and not (match[2] and match[4])):
            raise ValueError(f"{text!r} is no size; give tokens, as in 500000 or 1.5M, or bytes, as in 128GB or 64GiB")
        units = _BINARY if match[3] else _UNITS
        return cls(float(match[1]) * units[match[2].upper()], bool(match[4]))

    def tokens(self, machine: Hardware) -> int:
        """Whole tokens of KV."""
        return int(self.amount / machine.kv_bytes_per_token if self.in_bytes else self.amount)


def add_command(commands: Commands) -> None:
    """Adds `simulate` to the command line."""
    parser = commands.add_parser(
        "simulate",
        help="compare scheduling policies on recorded programs",
        description="Runs recorded programs through the scheduler under a virtual clock, policy by policy.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE", help="a trace; its kind is seen from it")
    parser.add_argument("--policy", action="append", metavar="P", help="may be repeated (default: vllm and treadle)")
    parser.add_argument("--engine", default="h100-8b", metavar="NAME", help="what steps cost (default: h100-8b)")
    parser.add_argument("--pool", type=_size, metavar="SIZE", help="KV on the device: 1000000 tokens, 1M, or 128GB")
    parser.add_argument("--host", type=_size, metavar="SIZE", help="KV that host memory holds beside it (default: 0)")
    parser.add_argument(
        "--sweep",
        action="append",
        type=_sweep,
        default=[],
        metavar="WHAT=A,B,...",
        help="one point for each value of pool, host, programs or per-hour; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line: policy, seed and point")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw charts (needs the extra `plot`)")
    _add_load_options(parser)
    parser.set_defaults(run=run, usage_error=parser.error)


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("load")
    starts = load.add_mutually_exclusive_group()
    text = f"programs at once; one begins when one ends (default: {DEFAULT_PROGRAMS})"
    starts.add_argument("--programs", type=_count, metavar="N", help=text)
    starts.add_argument("--per-hour", type=_positive, metavar="RATE", help="programs an hour, at random times")
    starts.add_argument("--recorded", action="store_true", help="programs start when they did in the trace")
    load.add_argument("--total", type=_count, default=120, metavar="N", help="programs in all, or all (default: 120)")
    load.add_argument("--seeds", type=_count, default=1, metavar="K", help="draw programs and times K times")
    load.add_argument("--half", choices=("tune", "report", "all"), default="all", help="programs of one half only")
    load.add_argument("--max-calls", type=_count, default=80, metavar="N", help="calls of a program (default: 80)")
    text = "tokens of a call (default: 150000)"
    load.add_argument("--max-tokens", type=_count, default=150_000, metavar="N", help=text)
    load.add_argument("--max-pause", type=_positive, metavar="S", help="cut recorded pauses to so many seconds")
    load.add_argument("--pauses", default="recorded", metavar="P", help=f"how long tools take: {FORMS}")
    text = "goodput counts programs that take at most K times what they take alone (default: 2)"
    load.add_argument("--deadline", type=_positive, default=2.0, metavar="K", help=text)


def run(args: argparse.Namespace) -> int:
    """Prints a line for each simulation, or a table for each point."""
    if args.plot is not None:
        from treadle.runtime.cli.simulate_chart import check_plotting

        check_plotting(args.plot)
    with _user_errors():
        band = Band(_study(args))
    results = []
    with contextlib.ExitStack() as stack:
        show = _watcher(stack, len(band), quiet=args.json)
        for result in band.results(show, time.perf_counter):
            results.append(result)
            if args.json:
                print(json.dumps(dataclasses.asdict(result)), flush=True)
    if args.plot is not None:
        from treadle.runtime.cli.simulate_chart import draw

        draw(results, args.plot)
    if not args.json:
        from treadle.runtime.cli.simulate_table import print_tables

        print_tables(results, validated=band.study.hardware.validated)
    return 0


def _study(args: argparse.Namespace) -> Study:
    machine = hardware.load(args.engine)
    with status(f"reading {args.trace}"):
        workload = traces.read(args.trace)
    return Study(
        workload,
        machine,
        policies=tuple(map(presets.policy, dict.fromkeys(args.policy or DEFAULT_POLICIES))),
        points=_points(args, machine),
        num_seeds=args.seeds,
        sample=Sample(args.total, args.half, args.max_calls, args.max_tokens, args.max_pause, args.pauses),
        recorded=args.recorded,
        deadline=args.deadline,
    )


def _points(args: argparse.Namespace, machine: Hardware) -> tuple[Point, ...]:
    """Every combination of the values that are swept, with those of the options where nothing is."""
    axes: dict[str, list[Any]] = dict(args.sweep)
    if len(axes) < len(args.sweep):
        args.usage_error("--sweep: each of pool, host, programs and per-hour may be swept once")
    open_arrivals = args.per_hour is not None or args.recorded or "per-hour" in axes
    if (args.recorded and axes.keys() & {"programs", "per-hour"}) or (open_arrivals and "programs" in axes):
        args.usage_error("--sweep: programs at once, programs an hour and recorded arrivals exclude each other")
    if "per-hour" in axes and args.programs is not None:
        args.usage_error("--sweep per-hour=... takes the place of --programs; leave one out")
    if args.pool is None and "pool" not in axes:
        args.usage_error("give --pool SIZE, or --sweep pool=SIZE,...")
    pools = axes.get("pool", [args.pool])
    hosts = axes.get("host", [args.host or Size(0, in_bytes=False)])
    at_once = axes.get("programs", [None if open_arrivals else args.programs or DEFAULT_PROGRAMS])
    rates = axes.get("per-hour", [args.per_hour])
    return tuple(
        Point(pool.tokens(machine), host.tokens(machine), programs, per_hour)
        for pool, host, programs, per_hour in itertools.product(pools, hosts, at_once, rates)
    )


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """What the room of the scheduler calls a wrong value is a wrong request here."""
    try:
        yield
    except ValueError as error:
        raise InvalidRequestError(str(error)) from error


def _watcher(stack: contextlib.ExitStack, total: int, *, quiet: bool) -> Callable[[str], object]:
    """What to tell of each simulation before it begins: a line that is replaced, on a terminal only."""
    if not sys.stderr.isatty() or (quiet and sys.stdout.isatty()):
        return lambda text: None
    line = stack.enter_context(error_console().status(""))
    numbers = itertools.count(1)
    return lambda text: line.update(f"{next(numbers)}/{total}  {text}")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value:g} is not a number above 0")
    return value


def _size(text: str) -> Size:
    try:
        return Size.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


_AXES: dict[str, Callable[[str], Any]] = {"pool": _size, "host": _size, "programs": _count, "per-hour": _positive}


def _sweep(text: str) -> tuple[str, list[Any]]:
    name, _, values = text.partition("=")
    if name not in _AXES:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be swept; give one of {', '.join(_AXES)}, as in pool=1M,2M")
    try:
        return name, list(dict.fromkeys(map(_AXES[name], values.split(","))))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{values!r}: give values of {name} with commas between them") from None
