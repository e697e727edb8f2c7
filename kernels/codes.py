"""Matrices in codes of 4 or 8 bits a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

GROUP = 32
"""Weights of a row that share a scale and a minimum."""


class Int4Matrix(NamedTuple):
    """`[out, in]` weights `scale * code + minimum`, with a scale and a minimum for each 32 of a row.

    Attributes:
        codes: uint8 `[out, in]`, 0 to 15.
        scales: float32 `[out, in / 32]`.
        minima: float32 `[out, in / 32]`.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor

    def dequantize(self) -> Tensor:
        """The float32 matrix that this stands for."""
        # NOTE: not addcmul_, which may fuse and then differs from other readers of such codes in the last bit.
        groups = self.codes.view(*self.scales.shape, GROUP).float()
        return groups.mul_(self.scales[..., None]).add_(self.minima[..., None]).flatten(-2)


class Int8Matrix(NamedTuple):
    """`[out, in]` weights `scale * code`, with a scale for each 32 of a row.

    Attributes:
        codes: int8 `[out, in]`.
        scales: float32 `[out, in / 32]`.
    """

    codes: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """The float32 matrix that this stands for."""
        return self.codes.view(*self.scales.shape, GROUP).float().mul_(self.scales[..., None]).flatten(-2)


Codes = TypeVar("Codes", Int4Matrix, Int8Matrix)


def quantize_int4(weight: Tensor) -> Int4Matrix:
    """The nearest codes between the least and the greatest of each 32 weights of a floating-point `[out, in]` matrix.

    `in` is a multiple of 32. No weight is off by more than a thirtieth of what its group spans.
    """
    groups = weight.float().reshape(len(weight), -1, GROUP)
    least, greatest = groups.aminmax(dim=-1)
    scales = (greatest - least) / 15
    steps = (groups - least[..., None]) / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return Int4Matrix(steps.round_().clamp_(0, 15).to(torch.uint8).flatten(-2), scales, least)


def quantize_int8(weight: Tensor) -> Int8Matrix:
    """The nearest codes between minus and plus the greatest of each 32 weights of a floating-point `[out, in]` matrix.

    `in` is a multiple of 32. No weight is off by more than a 254th of the greatest in its group.
    """
    groups = weight.float().reshape(len(weight), -1, GROUP)
    scales = groups.abs().amax(-1) / 127
    steps = groups / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return Int8Matrix(steps.round_().clamp_(-127, 127).to(torch.int8).flatten(-2), scales)


def concat_rows(matrices: Sequence[Codes]) -> Codes:
    """Matrices of the same inputs as one: the outputs of the first, then those of the next."""
    return type(matrices[0])(*(torch.cat(parts) for parts in zip(*matrices, strict=True)))
