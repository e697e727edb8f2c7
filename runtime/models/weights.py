"""From a checkpoint's matrices to the decoder's products: in the model's type, in 4 bits, or in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from treadle.kernels.head import Head
from treadle.kernels.int4 import (
    GROUP,
    OUT_MULTIPLE,
    Int4Linear,
    Int4Matrix,
    can_multiply_int4,
    concat_rows,
    fits_int4,
    quantize_int4,
)
from treadle.kernels.linear import Linear
from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.models.checkpoint import Checkpoint
from treadle.runtime.models.config import INT4_WEIGHTS, Weights
from treadle.runtime.models.layout import tensor_shapes

Projection: TypeAlias = Callable[[Tensor], Tensor]
"""The product of `[T, in]` inputs with the weights of a matrix, `[T, out]`, its bias added."""


class WeightReader:
    """Reads a checkpoint into the forms that a decoder computes with.

    Args:
        checkpoint: What is read. Every method raises `CorruptModelError` for what it lacks.
        dtype: The model's type, of all that is not in 4 bits.
        device: Where the weights go.
        weights: Which matrices are kept in 4 bits.
        packed: Whether matrices in `dtype` are laid out for the processor.

    Raises `InvalidRequestError` where 4 bits are asked for, and there is no product with them.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, weights: Weights, *, packed: bool
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._packed = packed
        self._shapes = dict(tensor_shapes(checkpoint.config))
        self._weights: Weights = weights
        if not can_multiply_int4(device, dtype):
            if weights in INT4_WEIGHTS:
                raise InvalidRequestError(
                    f"weights is {weights!r}: products with 4-bit weights are there for bfloat16 on a CPU with AVX2 or "
                    f"AVX-512, not for {str(dtype).removeprefix('torch.')} on this {device.type}; use weights='auto'"
                )
            self._weights = "full"

    def tensor(self, *names: str) -> Tensor:
        """Tensors in the model's type, joined along their first dimension."""
        parts = [self._checkpoint.tensor(name).to(self._dtype) for name in names]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous().to(self._device)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """The product with a matrix in the model's type."""
        return Linear(weight, bias, packed=self._packed)

    def head(self, weight: Tensor) -> Head:
        """The product with the matrix that logits come from."""
        return Head(weight, packed=self._packed)

    def projection(self, *names: str, bias: bool) -> Projection:
        """The product with some matrices of the same inputs, their outputs side by side.

        Raises `InvalidRequestError` for a matrix that is to be in 4 bits, and whose shape does not allow it.
        """
        weights = [f"{name}.weight" for name in names]
        biases = self.tensor(*(f"{name}.bias" for name in names)) if bias else None
        codes = self._int4(weights)
        if codes is None:
            return self.linear(self.tensor(*weights), biases)
        if self._weights == "int4-only":
            return Int4Linear(codes, biases)
        return Int4Linear(codes, biases, many=self.linear(codes.dequantize().to(self._dtype), biases))

    def _int4(self, names: Sequence[str]) -> Int4Matrix | None:
        """The joined codes of matrices, or None where they are to stay in the model's type."""
        if self._weights == "full" or not self._fits_int4(names):
            return None
        codes = [found for name in names if (found := self._codes(name)) is not None]
        return concat_rows(codes) if len(codes) == len(names) else None

    def _codes(self, name: str) -> Int4Matrix | None:
        stored = self._checkpoint.int4(name)
        if stored is None and self._weights in INT4_WEIGHTS:
            return quantize_int4(self._checkpoint.tensor(name))
        return stored

    def _fits_int4(self, names: Sequence[str]) -> bool:
        out_features, in_features = sum(self._shapes[name][0] for name in names), self._shapes[names[0]][1]
        fits = fits_int4(out_features, in_features)
        if not fits and self._weights in INT4_WEIGHTS:
            raise InvalidRequestError(
                f"weights is {self._weights!r}: {' and '.join(names)} have {out_features} rows of {in_features}, and "
                f"4 bits need multiples of {OUT_MULTIPLE} and {GROUP}; use weights='auto'"
            )
        return fits
