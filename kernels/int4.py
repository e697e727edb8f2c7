"""Products with weights in 4 bits that read the codes as they are, by an operation of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from treadle.kernels.codes import GROUP, Int4Matrix
from treadle.kernels.linear import Linear

OUT_MULTIPLE = 16
"""The kernel packs this many rows of a matrix together."""
FEW_ROWS = 8
"""Most inputs for which 4-bit codes are faster than bfloat16 weights.

Decoding a few rows waits for weights to come from memory, and codes are a quarter of them. But the kernel expands them
again for each four inputs, without the matrix unit, so its time grows with the inputs where bfloat16's stays the same.
"""


def can_multiply_int4(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a fast product of inputs of this type with 4-bit weights: bfloat16 on AVX2 and AVX-512."""
    capability = torch.backends.cpu.get_cpu_capability()
    return device.type == "cpu" and dtype == torch.bfloat16 and capability in ("AVX2", "AVX512")


def fits_int4(out_features: int, in_features: int) -> bool:
    """Whether the product can be had with a matrix of this shape."""
    return out_features % OUT_MULTIPLE == 0 and in_features % GROUP == 0


class Int4Linear:
    """`x @ weight.T + bias` for bfloat16 `[T, in]` inputs and weights in 4 bits.

    A result is as near to the exact one as a bfloat16 product is. A row's does not depend on the other rows, but for
    which of the two forms it comes from.

    Args:
        weight: `[out, in]`, a shape that `fits_int4`.
        bias: `[out]`, bfloat16.
        many: The same product with bfloat16 weights, for more than `FEW_ROWS` inputs. Without it codes serve them all.
    """

    def __init__(self, weight: Int4Matrix, bias: Tensor | None = None, *, many: Linear | None = None) -> None:
        # The kernel counts codes from the middle: scale * (code - 8) + zero.
        zeros = weight.minima + 8 * weight.scales
        self._scales_and_zeros = torch.stack((weight.scales.t(), zeros.t()), -1).to(torch.bfloat16)
        self._codes: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
        self._bias = bias
        self._many = many

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, out]` in bfloat16."""
        if self._many is not None and len(x) > FEW_ROWS:
            return self._many(x)
        # NOTE: torchao's own way to the kernel; torch has no public function for it.
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self._codes, GROUP, self._scales_and_zeros
        )
        return out if self._bias is None else out.add_(self._bias)
