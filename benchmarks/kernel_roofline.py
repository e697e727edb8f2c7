"""How near each tensor operation comes to what the device can do, and its result to float64.

    python benchmarks/kernel_roofline.py --device cuda

Of each operation: the median time, the bytes or floating-point operations a second, the share of the roofline, and the
error. The roofline is measured first: an operation takes at least the time to move its bytes at the rate of copying a
large tensor, and to compute its products at the rate of multiplying large matrices. Bytes are those that it must read
and write. Before each run a large tensor is written, so that no operand is in a cache. A GPU replays each operation as
a CUDA graph, like the decode steps of the engine, and no launch is in its time.

Errors are relative, of the Euclidean norm; of `choose`, the share of rows that get another token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from live.operations import Case, Operations, Sizes
from report import Parameter, Report, parser

from treadle.runtime.engine.config import DEVICES, DTYPES, DeviceName, torch_dtype
from treadle.runtime.engine.device import open_device
from treadle.runtime.models.random_weights import SHAPES

SHAPE: dict[DeviceName, str] = {"cpu": "smollm2-135m", "cuda": "llama-3.1-8b"}
QUICK = Sizes(batches=(2,), contexts=(128,), prefills=(64,), tokens=(4,), rows=4, pages=4)


@dataclass(frozen=True, slots=True)
class Effort:
    """Runs of which the median counts, bytes that no cache holds, and the side of square matrices to multiply."""

    repeats: int
    num_bytes: int
    side: int


EFFORT: dict[DeviceName, Effort] = {"cpu": Effort(15, 2**28, 2048), "cuda": Effort(100, 2**28, 8192)}
QUICK_EFFORT = Effort(1, 2**20, 256)


class Clock:
    """Median times of work whose operands are in no cache."""

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self._is_gpu = device.type == "cuda"
        self._repeats = effort.repeats
        self._large = torch.empty(effort.num_bytes, dtype=torch.uint8, device=device)

    def seconds(self, run: Callable[[], object]) -> float:
        """After a run that does not count."""
        run()
        return statistics.median(self._gpu_times(run) if self._is_gpu else self._cpu_times(run))

    def _cpu_times(self, run: Callable[[], object]) -> list[float]:
        times = []
        for _ in range(self._repeats):
            self._large.zero_()
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return times

    def _gpu_times(self, run: Callable[[], object]) -> list[float]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        pairs = [(timed_event(), timed_event()) for _ in range(self._repeats)]
        for began, ended in pairs:
            self._large.zero_()
            began.record()
            graph.replay()
            ended.record()
        torch.cuda.synchronize()
        return [began.elapsed_time(ended) / 1e3 for began, ended in pairs]


def timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Roofline:
    """What the device was seen to do in a second: bytes read and written, and floating-point operations."""

    bytes_per_s: float
    flops_per_s: float

    @classmethod
    def measured(cls, clock: Clock, device: torch.device, dtype: torch.dtype, effort: Effort) -> Roofline:
        """By a copy, and by the product of two matrices."""
        source = torch.zeros(effort.num_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        left, right = torch.randn(2, effort.side, effort.side, dtype=dtype, device=device)
        copying, multiplying = clock.seconds(lambda: target.copy_(source)), clock.seconds(lambda: left @ right)
        return cls(2 * effort.num_bytes / copying, 2 * effort.side**3 / multiplying)


def add_figure(report: Report, case: Case, seconds: float, roofline: Roofline) -> None:
    """An operation's time; beside it its rate, in the unit of what bounds it."""
    moving, computing = case.num_bytes / roofline.bytes_per_s, case.num_flops / roofline.flops_per_s
    found: dict[str, Parameter] = (
        {"gb_per_s": round(case.num_bytes / seconds / 1e9, 3)}
        if moving > computing
        else {"tflop_per_s": round(case.num_flops / seconds / 1e12, 4)}
    )
    found["roofline_percent"] = round(100 * max(moving, computing) / seconds, 2)
    found["error"] = float(f"{case.error(case.run(), case.exact()):.2e}")
    report.add(case.operation, 1e6 * seconds, "us", **case.parameters, **found)


@torch.inference_mode()
def measure(args: argparse.Namespace, dtype: torch.dtype, report: Report) -> None:
    device, effort = open_device(args.device), QUICK_EFFORT if args.quick else EFFORT[args.device]
    torch.manual_seed(0)
    clock = Clock(device.torch_device, effort)
    roofline = Roofline.measured(clock, device.torch_device, dtype, effort)
    report.add("copy", roofline.bytes_per_s / 1e9, "GB/s", num_bytes=effort.num_bytes)
    report.add("product", roofline.flops_per_s / 1e12, "TFLOP/s", side=effort.side)
    for case in Operations(SHAPES[args.shape], device, dtype).cases(QUICK if args.quick else Sizes()):
        add_figure(report, case, clock.seconds(case.run), roofline)


def main() -> None:
    options = parser((__doc__ or "").partition("\n")[0])
    options.add_argument("--device", choices=DEVICES, default="cpu", help="where to compute (default: cpu)")
    text = f"model whose shape the operands have (default: {SHAPE['cpu']} on a CPU, {SHAPE['cuda']} on a GPU)"
    options.add_argument("--shape", choices=tuple(SHAPES), metavar="SHAPE", help=text)
    options.add_argument("--dtype", choices=DTYPES, default="auto", help="element type (default: auto)")
    options.add_argument("--threads", type=int, help="threads for tensor operations (default: torch's)")
    args = options.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.shape = args.shape or SHAPE[args.device]
    dtype = torch_dtype(args.dtype, args.device)
    common: dict[str, Parameter] = {"device": args.device, "shape": args.shape}
    common |= {"dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    if args.device == "cuda":
        open_device(args.device)
        common["gpu"] = torch.cuda.get_device_name()
    report = Report(common, as_json=args.json)
    measure(args, dtype, report)
    report.finish()


if __name__ == "__main__":
    main()
