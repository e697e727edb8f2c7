"""Copies of pages as they ship: pages of 16 and 64 tokens, and their scales."""

import triton
from kernels_compile.harness import Variant

from treadle.kernels.pages import BLOCK, copy_pages_kernel


def copy_pages(element, size):
    return Variant(
        f"copy_pages-{element}-{size}",
        copy_pages_kernel,
        {
            "source": f"*{element}",
            "target": f"*{element}",
            "sources": "*i64",
            "targets": "*i64",
            "source_stride": "i64:16",
            "target_stride": "i64:16",
        },
        {"SIZE": size, "BLOCK_SIZE": min(BLOCK, triton.next_power_of_2(size))},
        uses=("ld.global.v4.b32", "st.global.v4.b32") if size % BLOCK == 0 else (),
        max_registers=64,
    )


VARIANTS = [
    copy_pages("bf16", 16 * 8 * 128),
    copy_pages("bf16", 64 * 8 * 128),
    copy_pages("fp16", 16 * 3 * 64),
    copy_pages("i8", 16 * 8 * 128),
    copy_pages("fp8e4nv", 16 * 8 * 128),
    copy_pages("fp32", 16 * 8),
    copy_pages("fp16", 16 * 8),
]
