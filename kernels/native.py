"""The operations of `native.c`: built once with the C compiler of this machine, and called on tensors.

They are for x86-64 processors with AMX and AVX-512 BF16, and for bfloat16. Torch's threads carry them out.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.c")
FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16")
"""What the processor must have, as Linux names it."""
FLAGS = (
    *("-std=gnu11", "-O3", "-shared", "-fPIC", "-mfma"),
    *(f"-m{name.replace('_', '')}" for name in FEATURES if name.startswith("avx")),
)
MOST_BUILD_S = 120
RUN_FIELDS, TASK_FIELDS = 4, 3
"""Numbers for each run (first token, tokens, slot, position of the first) and task (first run, runs, shared tokens)."""
MOST_HEAD_DIM = 512

_ARGUMENTS = {
    "treadle_linear": (c_void_p, c_void_p, c_void_p, c_int64, c_int),
    "treadle_norm": (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float),
    "treadle_norm_rope_write": (
        *(c_void_p, c_void_p, c_void_p, c_float, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
        *(c_int64, c_int64, c_int64, c_int64),
    ),
    "treadle_attention": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
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
        """As `Native.attention` takes them. The cache, of one layer, gives only its shape."""
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
        *((name, c_void_p) for name in ("x", "h", "qkv", "q", "attended", "gated")),
    )


class NativeUnavailable(Exception):
    """This machine cannot run the operations, or not build them; the message says why."""


class Native:
    """The operations. All tensors are bfloat16, contiguous and on the CPU, unless something else is said."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
        self._library = library

    def linear(self, weight: ctypes.Structure, x: Tensor, out: Tensor) -> None:
        """The product of `[T, in]` inputs with a weight as `native_linear` lays it out; `out` may be float32."""
        wide = out.dtype == torch.float32
        self._check(self._library.treadle_linear(ctypes.byref(weight), x.data_ptr(), out.data_ptr(), len(x), int(wide)))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As `reference.rms_norm`, of `[T, N]`."""
        out = torch.empty_like(x)
        tensors = x.data_ptr(), None, weight.data_ptr(), out.data_ptr()
        self._check(self._library.treadle_norm(*tensors, *x.shape, eps))
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """As `reference.add_rms_norm`, but `residual` itself becomes the sum."""
        out = torch.empty_like(x)
        tensors = x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr()
        self._check(self._library.treadle_norm(*tensors, *x.shape, eps))
        return out, residual

    def norm_rope_write(
        self,
        qkv: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        places: Tensor,
    ) -> Tensor:
        """As `reference.norm_rope_write`, for a cache that is not quantised."""
        kv_heads, size = cache.shape[3:]
        heads = qkv.shape[1] - 2 * kv_heads
        queries = qkv.new_empty(len(qkv), heads, size)
        self._check(
            self._library.treadle_norm_rope_write(
                qkv.data_ptr(),
                None if q_norm is None else q_norm.data_ptr(),
                None if k_norm is None else k_norm.data_ptr(),
                eps,
                cos.data_ptr(),
                sin.data_ptr(),
                cache[0].data_ptr(),
                cache[1].data_ptr(),
                places.data_ptr(),
                queries.data_ptr(),
                *(len(qkv), heads, kv_heads, size),
            )
        )
        return queries

    def attention(
        self, q: Tensor, cache: Tensor, page_table: Tensor, runs: Tensor, tasks: Tensor, window: int | None
    ) -> Tensor:
        """Causal attention of runs of tokens to the paged contexts of their calls.

        Args:
            q: `[T, H, D]`.
            cache: Keys and values of the layer, `[2, P, S, K, D]`.
            page_table: int64 `[slots, max_pages]`.
            runs: int32 `[R, 4]`, tokens of one call each: the first in `q`, how many, the slot, the position of the
                first.
            tasks: int32 `[M, 3]`, runs computed together: the first, how many, and how many tokens their contexts
                begin with in common, none of which is after the position of a first. Every token is in one task.
            window: How many tokens back a token sees, itself included.

        Returns:
            `[T, H, D]`.
        """
        out = torch.empty_like(q)
        contexts = Contexts.of(cache, q.shape[1], page_table, runs, tasks, window)
        tensors = q.data_ptr(), cache[0].data_ptr(), cache[1].data_ptr(), out.data_ptr()
        self._check(self._library.treadle_attention(ctypes.byref(contexts), *tensors))
        return out

    def layers(self, layers: ctypes.Array[LayerWeights], step: Pass, contexts: Contexts) -> None:
        """Takes the hidden states of a step through all layers: see `NativeLayers`."""
        self._check(self._library.treadle_layers(layers, len(layers), ctypes.byref(step), ctypes.byref(contexts)))

    @staticmethod
    def _check(succeeded: int) -> None:
        if not succeeded:
            raise MemoryError("there is no memory left for what an operation keeps while it runs")


@cache
def load_native(folder: Path) -> Native:
    """The operations, built into `folder` if they are not there yet.

    Raises `NativeUnavailable` where the processor, the system or a compiler is missing.
    """
    missing = missing_features()
    if missing:
        raise NativeUnavailable(f"this processor has no {', '.join(missing)}")
    try:
        library = ctypes.CDLL(str(_built(folder)))
        # The threads of torch: in whatever library they are, torch's own leads to it.
        torch_library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        threads = [
            ctypes.cast(function, c_void_p)
            for function in (torch_library.GOMP_parallel, torch_library.omp_get_max_threads)
        ]
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"native.c cannot be loaded: {error}") from None
    library.treadle_begin.argtypes = (c_void_p, c_void_p)
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


def _built(folder: Path) -> Path:
    """The library of this source and this compiler in a folder. It is put there whole or not at all."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise NativeUnavailable("there is no C compiler: install one, or name it in CC")
    key = hashlib.sha256(SOURCE.read_bytes() + "\0".join((*FLAGS, compiler)).encode()).hexdigest()[:16]
    library = folder / f"native-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        built = Path(staging) / library.name
        command = [*compiler.split(), *FLAGS, "-o", str(built), str(SOURCE), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=MOST_BUILD_S)
        except subprocess.CalledProcessError as error:
            raise NativeUnavailable(f"{compiler} cannot build native.c: {error.stderr.strip()[-500:]}") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeUnavailable(f"{compiler} cannot build native.c: {error}") from None
        os.replace(built, library)
    return library
