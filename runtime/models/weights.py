"""From a checkpoint's matrices to the decoder's products: in the model's type, in codes, or in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from treadle.kernels import reference
from treadle.kernels.codes import GROUP, Int4Matrix, Int8Matrix, concat_rows, quantize_int4, quantize_int8
from treadle.kernels.head import Head
from treadle.kernels.int4 import OUT_MULTIPLE, Int4Linear, can_multiply_int4, fits_int4
from treadle.kernels.linear import Linear
from treadle.kernels.native import Native
from treadle.kernels.native_linear import NativeLinear
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
        dtype: The model's type, of all that is not in codes.
        device: Where the weights go.
        weights: Which matrices are kept in codes.
        packed: Whether matrices in `dtype` are laid out for the processor.
        swiglu: `silu` of the first half of each row, times the second.
        native: What multiplies, instead of torch. Every matrix must have a shape that `fits_native`.

    Raises `InvalidRequestError` where codes are asked for, and there is no product with them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        weights: Weights,
        *,
        packed: bool,
        swiglu: Callable[[Tensor], Tensor] = reference.swiglu,
        native: Native | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._packed = packed
        self._swiglu = swiglu
        self._native = native
        self._shapes = dict(tensor_shapes(checkpoint.config))
        self._weights: Weights = weights
        if native is None and (weights == "int8" or not can_multiply_int4(device, dtype)):
            if weights == "int8" or weights in INT4_WEIGHTS:
                needs = "AMX, a C compiler and native=True" if weights == "int8" else "AVX2 or AVX-512"
                raise InvalidRequestError(
                    f"weights is {weights!r}: products with such weights are there for bfloat16 on a CPU with {needs}, "
                    f"not for {str(dtype).removeprefix('torch.')} on this {device.type}; use weights='auto'"
                )
            self._weights = "full"

    def tensor(self, *names: str) -> Tensor:
        """Tensors in the model's type, joined along their first dimension."""
        parts = [self._checkpoint.tensor(name).to(self._dtype) for name in names]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous().to(self._device)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """The product with a matrix in the model's type, by torch."""
        return Linear(weight, bias, packed=self._packed)

    def head(self, name: str, weight: Tensor | None) -> Projection:
        """The product, in float32, with the matrix that logits come from, or with its codes if it is stored in some.

        `weight` is that matrix, if it has been read for something else.
        """
        codes = self._checkpoint.codes(name) if self._native is not None and self._weights != "full" else None
        matrix = codes if codes is not None else self.tensor(name) if weight is None else weight
        if self._native is not None:
            return NativeLinear(self._native, matrix, dtype=torch.float32)
        assert isinstance(matrix, Tensor)
        return Head(matrix, packed=self._packed)

    def gated(self, gate: str, up: str, *, bias: bool) -> Projection:
        """`silu` of the product with one matrix, times that with another. Raises as `projection` does."""
        if self._native is not None:
            return self._native_projection((gate, up), bias=bias, gated=True)
        product, swiglu = self.projection(gate, up, bias=bias), self._swiglu
        return lambda x: swiglu(product(x))

    def projection(self, *names: str, bias: bool) -> Projection:
        """The product with some matrices of the same inputs, their outputs side by side.

        Raises `InvalidRequestError` for a matrix that is to be in codes, and whose shape does not allow it.
        """
        if self._native is not None:
            return self._native_projection(names, bias=bias)
        weights = [f"{name}.weight" for name in names]
        biases = self.tensor(*(f"{name}.bias" for name in names)) if bias else None
        codes = self._joined_codes(weights)
        if codes is None:
            return self.linear(self.tensor(*weights), biases)
        assert isinstance(codes, Int4Matrix)
        if self._weights == "int4-only":
            return Int4Linear(codes, biases)
        return Int4Linear(codes, biases, many=self.linear(codes.dequantize().to(self._dtype), biases))

    def _native_projection(self, names: Sequence[str], *, bias: bool, gated: bool = False) -> Projection:
        assert self._native is not None
        weights = [f"{name}.weight" for name in names]
        matrix = self._joined_codes(weights)
        biases = self.tensor(*(f"{name}.bias" for name in names)) if bias else None
        return NativeLinear(self._native, self.tensor(*weights) if matrix is None else matrix, biases, gated=gated)

    def _joined_codes(self, names: Sequence[str]) -> Int4Matrix | Int8Matrix | None:
        """The codes of matrices as one; None where they are to stay in the model's type, or are coded in two ways."""
        if self._weights == "full" or not (self._native is not None or self._fits_int4(names)):
            return None
        codes = [self._codes(name) for name in names]
        int4 = [matrix for matrix in codes if isinstance(matrix, Int4Matrix)]
        int8 = [matrix for matrix in codes if isinstance(matrix, Int8Matrix)]
        if len(int4) == len(names):
            return concat_rows(int4)
        if self._weights == "int8":
            return concat_rows([self._in_int8(name, matrix) for name, matrix in zip(names, codes, strict=True)])
        return concat_rows(int8) if len(int8) == len(names) and self._native is not None else None

    def _codes(self, name: str) -> Int4Matrix | Int8Matrix | None:
        stored = self._checkpoint.codes(name)
        if self._weights in INT4_WEIGHTS and not isinstance(stored, Int4Matrix):
            return quantize_int4(self._checkpoint.tensor(name))
        return stored

    def _in_int8(self, name: str, stored: Int4Matrix | Int8Matrix | None) -> Int8Matrix:
        return stored if isinstance(stored, Int8Matrix) else quantize_int8(self._checkpoint.tensor(name))

    def _fits_int4(self, names: Sequence[str]) -> bool:
        out_features, in_features = sum(self._shapes[name][0] for name in names), self._shapes[names[0]][1]
        fits = fits_int4(out_features, in_features)
        if not fits and self._weights in INT4_WEIGHTS:
            raise InvalidRequestError(
                f"weights is {self._weights!r}: {' and '.join(names)} have {out_features} rows of {in_features}, and "
                f"4 bits need multiples of {OUT_MULTIPLE} and {GROUP}; use weights='auto'"
            )
        return fits
