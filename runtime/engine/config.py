"""How an engine is set up, and what it makes of the machine that it is on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.models.config import WEIGHTS, ModelConfig, Weights
from treadle.scheduler.config import Costs

if TYPE_CHECKING:
    import torch

DeviceName = Literal["cpu", "cuda"]
DEVICES: tuple[DeviceName, ...] = ("cpu", "cuda")
DType = Literal["auto", "float32", "bfloat16"]
DTYPES: tuple[DType, ...] = ("auto", "float32", "bfloat16")
AT_LEAST_ONE = (
    "num_pages",
    "page_size",
    "num_slots",
    "max_step_tokens",
    "max_step_moves",
    "max_context",
    "num_threads",
)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes, policies and switches of an engine.

    Attributes:
        device: Where the model runs: `cpu`, or `cuda` for an NVIDIA GPU.
        dtype: Of weights and KV; `auto` is bfloat16 where the processor computes with it, else float32.
        num_pages: Pages of KV, at least one context. None takes 2 GiB on a CPU, at most an eighth of the memory that
            this process may use and what the weights leave of it; on a GPU nine tenths of what the weights leave.
        host_pages: Pages of KV in a second tier, where pages go that are evicted. On a CPU that is memory of the same
            kind: of use to see what a tier does, no faster than a larger pool.
        page_size: Tokens in a page.
        num_slots: Most calls that run at once.
        max_step_tokens: Most tokens computed in one step; longer prompts are computed in chunks.
        max_context: Most tokens of a call; None takes the model's.
        max_step_moves: Most pages saved to the second tier, and most loaded from it, in one step.
        order, retention, admission: Names of scheduling policies.
        costs: What computing and loading takes here, for policies that weigh it; None learns it.
        prefix_cache: Whether calls share the pages of common prefixes.
        cascade: Whether decoding reads what several contexts have in common once, and not once for each.
        graphs: Whether a GPU replays decode steps as CUDA graphs, captured when a batch size first comes.
        overlap: Whether a step is launched before the tokens of the one before are read. None: where the device
            works on its own; a CPU does not, so there it would only delay every token by a step.
        weights: Which matrices are in codes of 4 or 8 bits. `auto`: those that the checkpoint stores so (Q4_0, Q4_1,
            Q8_0), where there is a product with them, and the dtype is bfloat16. `full`: none. `int4`: all of the
            layers; others are rounded. `int8`: the same, and those stored in 4 bits stay so. Without `native` only 4
            bits have a product, for at most 8 tokens, and matrices are kept in bfloat16 too, but with `int4-only`:
            least memory, slow prompts.
        native: Whether a CPU computes with operations of our own, built by the C compiler at the first start. They are
            for bfloat16, and for processors with AMX; elsewhere, and without a compiler, torch computes.
        packed_weights: Whether torch's matrices are laid out for the processor when they are loaded. Only bfloat16
            gains, and a head that is tied to the embedding is kept twice, as it always is with `native`.
        learned: A file that keeps between runs how long pauses and outputs are: read, if it is there, when the engine
            is built, and written when it is closed. Of two engines that share one, the last to close wins.
        num_threads: Threads for tensor operations; None leaves torch's choice, within the process's share of the cores.
    """

    device: DeviceName = "cpu"
    dtype: DType = "auto"
    num_pages: int | None = None
    host_pages: int = 0
    page_size: int = 16
    num_slots: int = 64
    max_step_tokens: int = 512
    max_step_moves: int = 256
    max_context: int | None = None
    order: str = "treadle"
    retention: str = "treadle"
    admission: str = "treadle"
    costs: Costs | None = None
    prefix_cache: bool = True
    cascade: bool = True
    graphs: bool = True
    overlap: bool | None = None
    weights: Weights = "auto"
    native: bool = True
    packed_weights: bool = True
    learned: str | Path | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequestError(f"{name} is {value}; it must be at least 1")
        if self.host_pages < 0:
            raise InvalidRequestError(f"host_pages is {self.host_pages}; it must be at least 0")
        if self.device not in DEVICES:
            raise InvalidRequestError(f"device is {self.device!r}; choose one of {', '.join(DEVICES)}")
        if self.dtype not in DTYPES:
            raise InvalidRequestError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.weights not in WEIGHTS:
            raise InvalidRequestError(f"weights is {self.weights!r}; choose one of {', '.join(WEIGHTS)}")


def torch_dtype(dtype: DType, device: DeviceName = "cpu") -> torch.dtype:
    """The element type that `auto` or a name stands for on a device of this machine."""
    import torch

    if dtype == "auto":
        return torch.bfloat16 if device == "cuda" or has_fast_bfloat16() else torch.float32
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX); elsewhere float32 is faster."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def kv_bytes_per_token(model: ModelConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize


def default_num_threads(wanted: int, cores: float) -> int:
    """Torch's own choice, but no more than the whole cores that may be used up: threads that are paused hold all up."""
    return max(1, min(wanted, int(cores)))
