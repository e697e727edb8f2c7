"""The attention kernels as they ship: for layers of Llama-3.1-8B's shape, and of others that heads and caches have."""

import torch
from kernels_compile.harness import launches

from treadle.kernels.decode import decode_attention
from treadle.kernels.prefill import prefill_attention
from treadle.kernels.shared import shared_kernel, shared_prefix_attention

KV_HEADS = 8
SHAPES = [
    *((page, size, 4, torch.bfloat16) for page in (16, 32, 64) for size in (64, 128)),
    *((16, size, 2, torch.float16) for size in (64, 128)),
    *((16, 128, 4, dtype) for dtype in (torch.int8, torch.float8_e4m3fn, torch.float32)),
    (16, 96, 3, torch.bfloat16),
    (16, 256, 8, torch.bfloat16),
]
"""Page size, head size, query heads for each of key and value, and type of the cache."""
LLAMA = (16, 128, 4, torch.bfloat16)
OTHERS = [shape for shape in SHAPES if shape[0] == 16 and shape != LLAMA]


def meta(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def arguments(tokens, page, size, group, dtype):
    """Queries, a cache, its scales if it has 8 bits, and the tables of 16 rows."""
    q = meta(tokens, KV_HEADS * group, size, dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype)
    scales = meta(2, 64, page, KV_HEADS, dtype=torch.float32) if dtype.itemsize == 1 else None
    tables = meta(32, 128, dtype=torch.int32), meta(16, dtype=torch.int32), meta(16, dtype=torch.int32)
    return q, meta(2, 64, page, KV_HEADS, size, dtype=dtype), scales, *tables


def multiplies_with(instruction, dtype):
    """What to expect of a kernel: that tiles come as others are worked on, and that tensor cores multiply them."""
    return {"uses": ("cp.async",) if dtype == torch.float32 else ("cp.async", instruction)}


def decode(shape):
    q, cache, scales, page_table, slots, lengths = arguments(16, *shape)
    return launches(
        "-".join(map(str, shape)),
        lambda: decode_attention(q, cache, page_table, slots, lengths, num_splits=8, scales=scales),
        # Two programs, at the least, have room on a processor.
        decode_kernel={**multiplies_with("mma.sync", shape[3]), "max_registers": 192},
    )


def prefill(shape, *, max_new=512, window=None):
    q, cache, scales, page_table, slots, lengths = arguments(1024, *shape)
    tables, options = (page_table, slots, meta(17, dtype=torch.int32), lengths), {"window": window, "scales": scales}
    return launches(
        "-".join(map(str, (*shape, max_new, window))),
        lambda: prefill_attention(q, cache, *tables, max_new=max_new, **options),
        prefill_kernel=multiplies_with("wgmma", shape[3]),
    )


def shared(shape, *, window=None):
    q, cache, scales, page_table, slots, lengths = arguments(16, *shape)
    tables, options = (page_table, slots, lengths, meta(8, 3, dtype=torch.int32)), {"window": window, "scales": scales}
    return launches(
        "-".join(map(str, ("shared", *shape, window))),
        lambda: shared_prefix_attention(q, cache, *tables, num_splits=8, shared_splits=8, **options),
        shared_kernel=multiplies_with("wgmma" if shape[2] > 2 else "mma.sync", shape[3]),
    )


VARIANTS = [
    *(variant for shape in SHAPES for variant in decode(shape)),
    *(variant for shape in SHAPES for variant in prefill(shape)),
    *prefill(LLAMA, max_new=8),
    *prefill(LLAMA, window=4096),
    *(variant for shape in OTHERS for variant in shared(shape) if variant.kernel is shared_kernel),
    *shared(LLAMA),
    *shared(LLAMA, window=4096)[:1],
]
