"""The operations that a decoder and its sampler are made of, as a table: one for each kind of device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from treadle.kernels import reference, sampling

if TYPE_CHECKING:
    from treadle.kernels.native import Native


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
        bitmasks: Tensor | None,
        mask_rows: Tensor,
    ) -> Tensor: ...


class DecodeKernel(Protocol):
    """See `decode.decode_attention`."""

    def __call__(
        self,
        q: Tensor,
        cache: Tensor,
        page_table: Tensor,
        slots: Tensor,
        lengths: Tensor,
        *,
        num_splits: int,
        window: int | None = None,
    ) -> Tensor: ...


class PrefillKernel(Protocol):
    """See `prefill.prefill_attention`."""

    def __call__(
        self,
        q: Tensor,
        cache: Tensor,
        page_table: Tensor,
        slots: Tensor,
        starts: Tensor,
        lengths: Tensor,
        *,
        max_new: int,
        window: int | None = None,
    ) -> Tensor: ...


class SharedKernel(Protocol):
    """See `shared.shared_prefix_attention`."""

    def __call__(
        self,
        q: Tensor,
        cache: Tensor,
        page_table: Tensor,
        slots: Tensor,
        lengths: Tensor,
        groups: Tensor,
        *,
        num_splits: int,
        shared_splits: int,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class PagedKernels:
    """Attention that follows page tables on the device. `num_splits` of a decode step is by its rows and KV heads."""

    decode: DecodeKernel
    shared: SharedKernel
    prefill: PrefillKernel
    num_splits: Callable[[int, int], int]


@dataclass(frozen=True, slots=True)
class Ops:
    """What has a kernel on some device. `reference` and `sampling` say what each does.

    `add_rms_norm` may write over its second argument. Without `paged` kernels contexts are gathered before they are
    attended to.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    norm_rope_write: NormRopeWrite
    swiglu: Callable[[Tensor], Tensor]
    copy_pages: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    choose: Choose
    paged: PagedKernels | None = None


REFERENCE = Ops(
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    norm_rope_write=reference.norm_rope_write,
    swiglu=reference.swiglu,
    copy_pages=reference.copy_pages,
    choose=sampling.choose,
)


def native_ops(native: Native) -> Ops:
    """What there is of `native.c` outside of the layers, which are one operation (`NativeLayers`)."""
    return replace(REFERENCE, add_rms_norm=native.add_rms_norm)
