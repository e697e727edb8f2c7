"""What this machine has, as far as running a model goes: read from the system, or measured on the spot."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from treadle.runtime.config import c_compiler
from treadle.runtime.engine.cgroup import usable_cores, usable_memory

PACKAGES = ("torch", "numpy", "safetensors", "gguf", "tokenizers", "jinja2", "rich")
CPU_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts. Memory is in bytes, rates are per second; None is what could not be found out."""

    python: str
    python_is_debug: bool
    platform: str
    packages: dict[str, str | None]
    cpu: str
    cpu_features: dict[str, bool]
    cores: int
    cores_usable: float
    load_average: float
    memory: int
    memory_available: int | None
    gpu: str | None


@dataclass(frozen=True, slots=True)
class Torch:
    """Facts about torch on this machine. The rates were measured with `threads` threads."""

    version: str
    is_debug: bool
    blas: str
    threads: int
    auto_dtype: str
    bfloat16_gflops: float
    float32_gflops: float
    read_bytes: float


def read_machine() -> Machine:
    """What can be known without torch."""
    return Machine(
        python=platform.python_version(),
        python_is_debug=hasattr(sys, "gettotalrefcount"),
        platform=platform.platform(terse=True),
        packages={name: _version(name) for name in PACKAGES},
        cpu=_cpu_name(),
        cpu_features={},
        cores=os.cpu_count() or 1,
        cores_usable=usable_cores(),
        load_average=os.getloadavg()[0],
        memory=usable_memory(),
        memory_available=_memory_available(),
        gpu=_gpu(),
    )


def cpu_features() -> dict[str, bool]:
    """The extensions that decide how fast matrices multiply, as torch sees them."""
    import torch

    found = torch.cpu.get_capabilities()
    return {name: bool(found.get(name, False)) for name in CPU_FEATURES}


def native_problem(folder: Path) -> str | None:
    """Why the operations of `native.c`, which are built into a folder, cannot be used; None if they can."""
    from treadle.kernels.native import NativeUnavailable, load_native

    try:
        load_native(folder, c_compiler())
    except NativeUnavailable as error:
        return str(error)
    return None


def read_torch() -> Torch:
    """What torch says of itself, and how fast it is here: about a second of measuring."""
    import torch

    from treadle.runtime.engine.config import torch_dtype

    return Torch(
        version=torch.__version__,
        is_debug=bool(torch.version.debug),
        blas="mkl" if "BLAS_INFO=mkl" in torch.__config__.show() else "not mkl",
        threads=torch.get_num_threads(),
        auto_dtype=str(torch_dtype("auto")).removeprefix("torch."),
        bfloat16_gflops=_matmul_gflops(torch.bfloat16),
        float32_gflops=_matmul_gflops(torch.float32),
        read_bytes=_read_rate(),
    )


def _matmul_gflops(dtype: Any) -> float:
    import torch

    tokens, size_in, size_out = 256, 1024, 1024
    x, weight = torch.ones(tokens, size_in, dtype=dtype), torch.ones(size_out, size_in, dtype=dtype)
    seconds = _median_seconds(lambda: torch.nn.functional.linear(x, weight))
    return 2 * tokens * size_in * size_out / seconds / 1e9


def _read_rate() -> float:
    """Bytes a second of a sum over more memory than a cache of usual size holds."""
    import torch

    numbers = torch.ones(2**26, dtype=torch.float32)
    return numbers.numel() * numbers.itemsize / _median_seconds(numbers.sum)


def _median_seconds(work: Callable[[], object], seconds: float = 0.2) -> float:
    """Of calls during `seconds`, after as long a warm-up: first calls pay for threads and for packing code."""
    for _ in range(2):
        times: list[float] = []
        while sum(times) < seconds or len(times) < 3:
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_available() -> int | None:
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _gpu() -> str | None:
    """The name of an NVIDIA GPU, from its driver."""
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    for card in cards:
        for line in card.read_text(errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return None
