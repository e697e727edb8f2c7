"""The operations of `native.c`: built once with the C compiler of this machine, and called on tensors.

They are for x86-64 processors with AMX and AVX-512 BF16 and FP16, and for bfloat16. Torch's threads carry them out.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.c")
INCLUDED = "c/*.h"
"""What the source includes, beside it."""
FEATURES = (
    *("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16"),
)
"""What the processor must have, as Linux names it."""
FLAGS = (
    *("-std=gnu11", "-O3", "-shared", "-fPIC", "-mfma"),
    *(f"-m{name.replace('_', '')}" for name in FEATURES if name.startswith("avx")),
)
MOST_BUILD_S = 120
MOST_HEAD_DIM = 512
SPAN = 64
"""Tokens of context that attention goes through at a time."""
TILE_ROWS = 16
"""Tokens in a tile: there is room for whole tiles of what is multiplied."""

_ARGUMENTS = {
    "treadle_linear": (c_void_p, c_void_p, c_void_p, c_int64, c_int),
    "treadle_norm": (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float),
    "treadle_layers": (c_void_p, c_int64, c_void_p, c_void_p),
}


class Contexts(ctypes.Structure):
    """What attention needs to know of a step; the tensors that it names must live as long."""

    _fields_ = (
        ("page_table", c_void_p),
        ("pages_per_slot", c_int64),
        ("page_size", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("window", c_int64),
        ("runs", c_void_p),
        ("tasks", c_void_p),
        ("num_tasks", c_int64),
    )

    @classmethod
    def of(
        cls, cache: Tensor, heads: int, page_table: Tensor, runs: Tensor, tasks: Tensor, window: int | None
    ) -> Contexts:
        """What causal attention of runs of tokens to the paged contexts of their calls needs.

        Args:
            cache: Of any layer, `[2, P, S, K, D]`: only its shape counts.
            heads: Query heads.
            page_table: int64 `[slots, max_pages]`.
            runs: int32 `[R, 4]`, tokens of one call each: the first in the step, how many, the slot, the position of
                the first.
            tasks: int32 `[M, 3]`, runs computed together: the first, how many, and how many tokens their contexts
                begin with in common: a multiple of `SPAN`, none after the position of a first, and 0 where there is a
                window. Every token is in one task.
            window: How many tokens back a token sees, itself included.
        """
        _, _, page_size, kv_heads, head_dim = cache.shape
        return cls(
            *(page_table.data_ptr(), page_table.shape[1], page_size, heads, kv_heads, head_dim, window or 0),
            *(runs.data_ptr(), tasks.data_ptr(), len(tasks)),
        )


class LayerWeights(ctypes.Structure):
    """Addresses of a layer's norms and of its products' weights."""

    _fields_ = tuple(
        (name, c_void_p) for name in ("attention_norm", "q_norm", "k_norm", "mlp_norm", "qkv", "o", "gated", "down")
    )


class Pass(ctypes.Structure):
    """What a step computes with, and where it puts what it computes."""

    _fields_ = (
        ("tokens", c_int64),
        ("hidden", c_int64),
        ("eps", c_float),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("places", c_void_p),
        ("kv", c_void_p),
        ("layer_stride", c_int64),
        ("side_stride", c_int64),
        *((name, c_void_p) for name in ("x", "added", "h", "qkv", "q", "attended", "gated")),
    )


class NativeUnavailable(Exception):
    """This machine cannot run the operations, or not build them; the message says why."""


class Native:
    """The operations; `library` has their parts too.

    All tensors are bfloat16, contiguous and on the CPU, unless something else is said.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
        self.library = library

    def linear(self, weight: ctypes.Structure, x: Tensor, out: Tensor) -> None:
        """The product of `[T, in]` inputs with a weight as `native_linear` lays it out.

        `out` may be float32, and begins at a multiple of 64 bytes, as all tensors that torch makes do.
        """
        wide = out.dtype == torch.float32
        torch.get_num_threads()  # makes torch's number that of OpenMP, which is each thread's own
        self._check(self.library.treadle_linear(ctypes.byref(weight), x.data_ptr(), out.data_ptr(), len(x), int(wide)))

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """As `reference.add_rms_norm`, but `residual` itself becomes the sum."""
        out = torch.empty_like(x)
        tensors = x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr()
        self._check(self.library.treadle_norm(*tensors, *x.shape, eps))
        return out, residual

    def layers(self, layers: ctypes.Array[LayerWeights], step: Pass, contexts: Contexts) -> None:
        """Takes the hidden states of a step through all layers: see `NativeLayers`."""
        torch.get_num_threads()  # as in `linear`
        self._check(self.library.treadle_layers(layers, len(layers), ctypes.byref(step), ctypes.byref(contexts)))

    @staticmethod
    def _check(succeeded: int) -> None:
        if not succeeded:
            raise MemoryError("there is no memory left for what an operation keeps while it runs")


@cache
def load_native(folder: Path, compiler: str | None) -> Native:
    """The operations, built into `folder` by a C compiler, with its arguments, if they are not there yet.

    Raises `NativeUnavailable` where the processor, the system or a compiler is missing.
    """
    missing = missing_features()
    if missing:
        raise NativeUnavailable(f"this processor has no {', '.join(missing)}")
    try:
        library = ctypes.CDLL(str(_built(folder, compiler)))
        # The threads of torch: in whatever library they are, torch's own leads to it.
        torch_library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        names = ("GOMP_parallel", "omp_get_max_threads", "omp_get_thread_num")
        threads = [ctypes.cast(getattr(torch_library, name), c_void_p) for name in names]
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"native.c cannot be loaded: {error}") from None
    library.treadle_begin.argtypes = (c_void_p, c_void_p, c_void_p)
    if not library.treadle_begin(*threads):
        raise NativeUnavailable("the system does not let this process use AMX")
    return Native(library)


def missing_features() -> list[str]:
    """What this processor lacks of `FEATURES`; all of them where it is no x86-64 under Linux."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return list(FEATURES)
    with Path("/proc/cpuinfo").open(encoding="ascii", errors="replace") as lines:
        found = next((line.split() for line in lines if line.startswith("flags")), [])
    return [name for name in FEATURES if name not in found]


def _built(folder: Path, compiler: str | None) -> Path:
    """The library of this source and this compiler in a folder. It is put there whole or not at all."""
    if compiler is None:
        raise NativeUnavailable("there is no C compiler: install one, or name it in CC")
    sources = [SOURCE, *sorted(SOURCE.parent.glob(INCLUDED))]
    text = b"".join(path.read_bytes() for path in sources)
    key = hashlib.sha256(text + "\0".join((*FLAGS, compiler)).encode()).hexdigest()[:16]
    library = folder / f"native-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        built = Path(staging) / library.name
        command = [*shlex.split(compiler), *FLAGS, "-o", str(built), str(SOURCE), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=MOST_BUILD_S)
        except subprocess.CalledProcessError as error:
            raise NativeUnavailable(f"{compiler} cannot build native.c: {error.stderr.strip()[-500:]}") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeUnavailable(f"{compiler} cannot build native.c: {error}") from None
        os.replace(built, library)
    return library
