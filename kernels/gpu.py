"""The operations of a GPU: Triton kernels. Importing this needs Triton, which comes with torch's builds for CUDA."""

from __future__ import annotations

from treadle.kernels.choose import choose
from treadle.kernels.decode import decode_attention
from treadle.kernels.fused import add_rms_norm, norm_rope_write, rms_norm, swiglu
from treadle.kernels.ops import Ops, PagedKernels
from treadle.kernels.pages import copy_pages
from treadle.kernels.prefill import prefill_attention
from treadle.kernels.shared import shared_prefix_attention
from treadle.kernels.tiles import decode_splits

TRITON = Ops(
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    norm_rope_write=norm_rope_write,
    swiglu=swiglu,
    copy_pages=copy_pages,
    choose=choose,
    paged=PagedKernels(
        decode=decode_attention,
        shared=shared_prefix_attention,
        prefill=prefill_attention,
        num_splits=decode_splits,
    ),
)
