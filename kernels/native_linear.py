"""Products with weights as `native.c` reads them: bfloat16, or codes of 4 or 8 bits that stay codes."""

from __future__ import annotations

import ctypes
import math
from typing import TypeAlias

import torch
from torch import Tensor

from treadle.kernels.codes import GROUP, Int4Matrix, Int8Matrix
from treadle.kernels.native import Native

OUT_MULTIPLE = 16
"""Outputs that lie side by side."""

_CODED_UNIT = 1 << 16
"""`CODED_UNIT` of `native.c`."""

Matrix: TypeAlias = Tensor | Int4Matrix | Int8Matrix
"""`[out, in]` weights in one of three forms."""


class _Weight(ctypes.Structure):
    """What `native.c` knows of a matrix."""

    _fields_ = (
        ("format", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("gated", ctypes.c_int64),
        ("blocks", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
    )


class NativeLinear:
    """`x @ weight.T + bias`, summed in float32. A row's result depends on the others only by how many there are.

    With codes, up to 8 inputs, in 16 bits each, are multiplied with them as they are, and more with the weights that
    the codes stand for, rounded to bfloat16.

    Args:
        native: The operations.
        weight: `[out, in]`, a shape that `fits_native`; a tensor is bfloat16.
        bias: `[out]`, bfloat16.
        dtype: Of results, bfloat16, or float32 if they are not gated.
        gated: The first half of the outputs are gates of the second: `silu(gate) * other` comes out, half as many.
    """

    def __init__(
        self,
        native: Native,
        weight: Matrix,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        gated: bool = False,
    ) -> None:
        self._native = native
        self._dtype = dtype
        if isinstance(weight, Tensor):
            kind, blocks, factors, (out_features, in_features) = 0, _tiles(weight), None, weight.shape
        else:
            kind, (out_features, in_features) = 1 if isinstance(weight, Int8Matrix) else 2, weight.codes.shape
            blocks, factors = _coded_blocks(weight)
        # The weight holds addresses only: what is there must live as long.
        self._tensors = blocks, bias, factors
        assert fits_native(out_features, in_features)
        assert not gated or (dtype == torch.bfloat16 and out_features % (2 * OUT_MULTIPLE) == 0)
        self.out_features = out_features // 2 if gated else out_features
        bias_at, factors_at = (None if x is None else x.data_ptr() for x in (bias, factors))
        self.weight = _Weight(kind, in_features, out_features, gated, blocks.data_ptr(), bias_at, factors_at)

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, out]` of bfloat16 `[T, in]`."""
        out = torch.empty(len(x), self.out_features, dtype=self._dtype)
        self._native.linear(self.weight, x.contiguous(), out)
        return out


def fits_native(out_features: int, in_features: int) -> bool:
    """Whether there is a product with a matrix of this shape."""
    return out_features % OUT_MULTIPLE == 0 and in_features % GROUP == 0


def _tiles(weight: Tensor) -> Tensor:
    """For each 16 outputs and 32 inputs a tile: of each two inputs, 16 outputs in pairs."""
    out_features, in_features = weight.shape
    blocks = weight.view(out_features // OUT_MULTIPLE, OUT_MULTIPLE, in_features // GROUP, GROUP // 2, 2)
    return blocks.permute(0, 2, 3, 1, 4).contiguous()


def _coded_blocks(matrix: Int4Matrix | Int8Matrix) -> tuple[Tensor, Tensor]:
    """For each 16 outputs and 32 inputs: scales, minima, and of each four inputs, 0 2 1 3, 16 outputs of four codes.

    In 4 bits, those of the four inputs after them share their bytes. With the blocks come the factors of outputs, which
    are powers of two: scales and minima are such that no weight is more than 2^14 in float16.
    """
    out_features, in_features = matrix.codes.shape
    columns, steps = out_features // OUT_MULTIPLE, in_features // GROUP
    if isinstance(matrix, Int8Matrix):
        fours = (matrix.codes.view(torch.uint8) ^ 128).view(torch.int32)
        greatest = 128 * matrix.scales.abs().amax(-1)
    else:
        pairs = matrix.codes.view(torch.int32).view(out_features, -1, 2)
        fours = pairs[..., 0] | (pairs[..., 1] << 4)
        greatest = torch.maximum(matrix.minima.abs(), (matrix.minima + 15 * matrix.scales).abs()).amax(-1)
    fours = fours.view(columns, OUT_MULTIPLE, steps, -1).permute(0, 2, 3, 1).flatten(2)
    exchanged = (fours >> 8).bitwise_xor_(fours).bitwise_and_(0xFF00)
    fours.bitwise_xor_(exchanged).bitwise_xor_(exchanged.bitwise_left_shift_(8))
    units = torch.exp2(torch.frexp(greatest).exponent.float() - 14)
    scales = (matrix.scales / units[:, None]).half()
    minima = -128 * scales if isinstance(matrix, Int8Matrix) else (matrix.minima / units[:, None]).half()

    def by_block(x: Tensor) -> Tensor:
        return x.view(columns, OUT_MULTIPLE, steps).transpose(1, 2).contiguous().view(torch.uint8)

    # Outputs of zeros are exactly zero; those of what is not finite are not, and so are noticed.
    factors = (units * _CODED_UNIT).masked_fill_(greatest == 0, 0).masked_fill_(~greatest.isfinite(), math.nan)
    return torch.cat((by_block(scales), by_block(minima), fours.view(torch.uint8)), -1), factors
