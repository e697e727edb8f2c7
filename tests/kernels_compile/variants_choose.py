"""The kernels that choose tokens as they ship, for vocabularies of 49,152 to 151,936 tokens."""

import triton
from kernels_compile.harness import Variant

from treadle.kernels.choose import BLOCK, DECIDE_WARPS, SCAN_WARPS, decide_kernel, scan_kernel

GIVEN = {
    "bests": "*fp32",
    "winner_values": "*fp32",
    "winners": "*i32",
    "logits": "*fp32",
    "stride": "i32:16",
    "bitmasks": "*i32",
    "mask_rows": "*i64",
    "temperatures": "*fp32",
    "top_k": "*i64",
    "top_p": "*fp32",
    "min_p": "*fp32",
    "seeds": "*i64",
    "positions": "*i64",
}


def variants(size, masked):
    fixed = {"V": size, "BLOCK_V": BLOCK, "MASKED": masked}
    blocks = triton.next_power_of_2(triton.cdiv(size, BLOCK))
    name = f"{size}{'-masked' if masked else ''}"
    yield Variant(f"scan-{name}", scan_kernel, GIVEN, fixed, num_warps=SCAN_WARPS, max_registers=64)
    decide = {**fixed, "NUM_BLOCKS": blocks}
    tokens = {"tokens": "*i64", **GIVEN}
    yield Variant(f"decide-{name}", decide_kernel, tokens, decide, num_warps=DECIDE_WARPS, max_registers=128)


VARIANTS = [v for size in (49152, 128256, 151936) for masked in (False, True) for v in variants(size, masked)]
