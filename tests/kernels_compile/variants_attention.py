"""The attention kernels as they ship."""

from kernels_compile.harness import Variant

from treadle.kernels.merge import merge_kernel

VARIANTS = [
    Variant(
        f"merge-{parts}-{size}",
        merge_kernel,
        {"out": "*bf16", "sums": "*fp32", "weights": "*fp32", "out_row_stride": "i32:16"},
        {"PARTS": parts, "BLOCK_PARTS": parts, "D": size, "BLOCK_D": size},
    )
    for parts in (1, 8, 32)
    for size in (64, 128)
]
