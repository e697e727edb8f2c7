"""The operations that a decoder and its sampler are made of, as a table: one for each kind of device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from treadle.kernels import reference, sampling


class NormRopeWrite(Protocol):
    """See `reference.norm_rope_write`."""

    def __call__(
        self,
        qkv: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        places: Tensor,
    ) -> Tensor: ...


class Choose(Protocol):
    """See `sampling.choose`."""

    def __call__(
        self,
        logits: Tensor,
        *,
        temperatures: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seeds: Tensor,
        positions: Tensor,
        bitmasks: Tensor | None = None,
        mask_rows: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Ops:
    """What has a kernel on some device. `reference` and `sampling` say what each does."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    norm_rope_write: NormRopeWrite
    swiglu: Callable[[Tensor], Tensor]
    copy_pages: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    choose: Choose


REFERENCE = Ops(
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    norm_rope_write=reference.norm_rope_write,
    swiglu=reference.swiglu,
    copy_pages=reference.copy_pages,
    choose=sampling.choose,
)
