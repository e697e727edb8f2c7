"""The fused kernels as they ship, for models with heads of 64 and 128 and hidden sizes of 1,024 to 5,120."""

import triton
from kernels_compile.harness import Variant

from treadle.kernels.fused import SWIGLU_BLOCK, norm_rope_write_kernel, norm_warps, rms_norm_kernel, swiglu_kernel
from treadle.kernels.reference import CODE_LIMITS

CODES = {"int8": "*i8", "e4m3": "*fp8e4nv"}


def rms_norm(element, size, add):
    block = triton.next_power_of_2(size)
    pointers = dict.fromkeys(("normed", "total", "x", "residual", "weight"), f"*{element}")
    return Variant(
        f"{'add_' if add else ''}rms_norm-{element}-{size}",
        rms_norm_kernel,
        {**pointers, "x_stride": "i32:16", "residual_stride": "i32:16", "eps": "fp32"},
        {"ADD": add, "N": size, "BLOCK_N": block},
        num_warps=norm_warps(block),
        max_registers=128,
    )


def norm_rope_write(element, stored, scale, size, group, norms):
    pointers = dict.fromkeys(("q", "qkv", "q_norm", "k_norm", "cos", "sin"), f"*{element}")
    strides = dict.fromkeys(("qkv_stride", "scales_side_stride"), "i32:16")
    return Variant(
        f"norm_rope_write-{element}-{stored}-{scale}-{size}x{group}{'-normed' if norms else ''}",
        norm_rope_write_kernel,
        {
            **pointers,
            **strides,
            "cache": CODES.get(stored, f"*{stored}"),
            "scales": f"*{scale}",
            "places": "*i64",
            "side_stride": "i64:16",
            "eps": "fp32",
        },
        {
            "NORM": norms,
            "LIMIT": {"int8": 127.0, "e4m3": 448.0}.get(stored, 0.0),
            "KV_HEADS": 8,
            "GROUP": group,
            "BLOCK_GROUP": triton.next_power_of_2(group),
            "D": size,
            "BLOCK_HALF": triton.next_power_of_2(size // 2),
        },
        num_warps=1,
        max_registers=168,
    )


def swiglu(element, size):
    return Variant(
        f"swiglu-{element}-{size}",
        swiglu_kernel,
        {"out": f"*{element}", "gate_up": f"*{element}", "stride": "i32:16"},
        {"F": size, "BLOCK_F": SWIGLU_BLOCK},
        max_registers=64,
    )


assert set(CODE_LIMITS.values()) == {127.0, 448.0}

VARIANTS = [
    *(rms_norm("bf16", size, add) for size in (1024, 4096, 5120) for add in (False, True)),
    rms_norm("fp16", 4096, True),
    *(norm_rope_write("bf16", "bf16", "bf16", *shape) for shape in ((64, 3, False), (128, 4, False), (128, 2, True))),
    norm_rope_write("fp16", "fp16", "fp16", 128, 4, True),
    *(norm_rope_write("bf16", stored, scale, 128, 4, True) for stored in CODES for scale in ("fp32", "fp16")),
    norm_rope_write("bf16", "bf16", "bf16", 96, 8, False),
    *(swiglu("bf16", size) for size in (3072, 14336)),
]
