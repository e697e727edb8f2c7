"""The attention kernels as they ship, for a layer of Llama-3.1-8B's or Qwen3-0.6B's shape and some others."""

import torch
from kernels_compile.harness import launches

from treadle.kernels.decode import decode_attention
from treadle.kernels.prefill import prefill_attention

KV_HEADS = 8


def meta(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def paged(page, size, dtype):
    """A cache of a type, its scales if it has 8 bits, and the tables of 16 rows."""
    scales = meta(2, 64, page, KV_HEADS, dtype=torch.float32) if dtype.itemsize == 1 else None
    tables = meta(32, 128, dtype=torch.int32), meta(16, dtype=torch.int32), meta(16, dtype=torch.int32)
    return meta(2, 64, page, KV_HEADS, size, dtype=dtype), tables, scales


def decode(page, size, group, dtype, *, splits=8):
    cache, (page_table, slots, lengths), scales = paged(page, size, dtype)
    q = meta(16, KV_HEADS * group, size, dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype)
    return launches(
        f"{page}-{size}-{group}-{dtype}".replace("torch.", ""),
        lambda: decode_attention(q, cache, page_table, slots, lengths, num_splits=splits, scales=scales),
        decode_kernel={"uses": ("cp.async", "mma.sync"), "max_registers": 168},
    )


def prefill(page, size, group, dtype, *, max_new=512, window=None):
    cache, (page_table, slots, lengths), scales = paged(page, size, dtype)
    q = meta(1024, KV_HEADS * group, size, dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype)
    arguments = page_table, slots, meta(17, dtype=torch.int32), lengths
    return launches(
        f"{page}-{size}-{group}-{dtype}-{max_new}-{window}".replace("torch.", ""),
        lambda: prefill_attention(q, cache, *arguments, max_new=max_new, window=window, scales=scales),
        prefill_kernel={"uses": ("cp.async", "wgmma")},
    )


SHAPES = [
    *((page, size, 4, torch.bfloat16) for page in (16, 32, 64) for size in (64, 128)),
    *((16, size, 2, torch.float16) for size in (64, 128)),
    *((16, 128, 4, dtype) for dtype in (torch.int8, torch.float8_e4m3fn)),
    (16, 96, 3, torch.bfloat16),
    (16, 256, 8, torch.bfloat16),
]
VARIANTS = [
    *(variant for shape in SHAPES for variant in decode(*shape)),
    *(variant for shape in SHAPES for variant in prefill(*shape)),
    *(variant for shape in SHAPES[:2] for variant in prefill(*shape, max_new=8)),
    *prefill(16, 128, 4, torch.bfloat16, window=4096),
]
