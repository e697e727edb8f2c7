"""vLLM's CPU build as an engine to compare.

It is set up as its documentation for processors advises: bfloat16, threads bound to cores, Intel's OpenMP and, where it
is installed, tcmalloc in place of the system's. All of it runs in this one process: on a few cores a second one for the
scheduler would only take time from the first.
"""

from __future__ import annotations

import ctypes.util
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peers.serving import Settings, serve

READY = "TREADLE_PEER_IS_SET_UP"
KV_GIB = 2


def set_up_process() -> None:
    """Starts this process again with the libraries and variables that must be there before it starts."""
    if READY in os.environ:
        return
    threads = int(os.environ["OMP_NUM_THREADS"])
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    openmp = Path(sys.prefix, "lib", "libiomp5.so")
    libraries = [str(openmp)] if openmp.exists() else []
    libraries += filter(None, [ctypes.util.find_library("tcmalloc_minimal")])
    environment = {
        READY: "1",
        "LD_PRELOAD": ":".join(libraries),
        # What vLLM sets for a worker that it starts itself.
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{cores}]",
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # vLLM 0.32 stores what it compiled ahead of time, and on a processor fails to load it: without, starts that
        # follow the first find the compiled code in torch's own cache, and take less than half as long.
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    os.execve(sys.executable, [sys.executable, "-m", "peers.vllm"], {**os.environ, **environment})


class VLLMEngine:
    """The engine under vLLM's `LLM` class, step by step, with the prefix cache on."""

    def __init__(self, settings: Settings) -> None:
        from vllm import EngineArgs, LLMEngine, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._engine: Any = LLMEngine.from_engine_args(
            EngineArgs(
                model=settings.model,
                skip_tokenizer_init=True,
                dtype="bfloat16",
                max_model_len=settings.max_context,
                max_num_seqs=settings.max_sequences,
                enable_prefix_caching=True,
                disable_log_stats=True,
            )
        )
        self._sampling: Any = SamplingParams
        self._only_new = RequestOutputKind.DELTA
        self._num_requests = 0
        self._sequences: dict[str, str] = {}
        self.version = f"vllm {_version()}"
        self.precision = "bfloat16"

    def begin(self, num_sequences: int, max_tokens: int, *, share_prefix: bool) -> None:
        self._engine.reset_prefix_cache()
        self._sequences.clear()

    def add(self, sequence: str, conversation: str, token_ids: list[int], new_tokens: int) -> None:
        sampling = self._sampling(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, output_kind=self._only_new
        )
        self._num_requests += 1
        request = f"request-{self._num_requests}"
        self._sequences[request] = sequence
        self._engine.add_request(request, {"prompt_token_ids": token_ids}, sampling)

    def step(self) -> list[tuple[str, list[int]]]:
        outputs = self._engine.step()
        return [(self._sequences[output.request_id], list(output.outputs[0].token_ids)) for output in outputs]

    def close(self) -> None:
        self._engine.engine_core.shutdown()


def _version() -> str:
    """The package for processors has another name than the one for accelerators."""
    try:
        return version("vllm-cpu")
    except PackageNotFoundError:
        return version("vllm")


if __name__ == "__main__":
    set_up_process()
    serve(VLLMEngine)
