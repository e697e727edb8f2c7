"""GGML blocks to float32, or to codes. The common 32-element blocks are done by torch, the others by `gguf`.

One block of 32 weights, quantised as in ggml-quants.c (low nibbles first: weights 0..15, then 16..31):

    Q4_0  | d: f16 | 16 bytes of nibbles |            w = d * (q - 8)
    Q4_1  | d: f16 | m: f16 | 16 bytes of nibbles |   w = d * q + m
    Q8_0  | d: f16 | 32 x int8 |                      w = d * q
"""

from __future__ import annotations

import math

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize

from treadle.kernels.codes import GROUP, Int4Matrix, Int8Matrix

INT4_QUANTIZATIONS = ("Q4_0", "Q4_1")
"""Element types that `read_int4` reads."""


def dequantize(
    data: np.ndarray[tuple[int], np.dtype[np.uint8]], quantization: str, shape: tuple[int, ...]
) -> torch.Tensor:
    """The float32 tensor of `shape` that `data`, the stored bytes, stands for. It never aliases `data`.

    Equal to what the `gguf` package's `dequantize` makes of it, which takes about four times as long.
    """
    owned = torch.from_numpy(data.copy())
    match quantization:
        case "F32":
            return owned.view(torch.float32).view(shape)
        case "F16":
            return owned.view(torch.float16).float().view(shape)
        case "BF16":
            return owned.view(torch.bfloat16).float().view(shape)
        case "Q4_0" | "Q4_1":
            return read_int4(data, quantization, shape).dequantize()
        case "Q8_0":
            return read_int8(data, shape).dequantize()
        case _:
            rows = data.reshape(*shape[:-1], -1)
            weights = gguf_dequantize(rows, GGMLQuantizationType[quantization])
            return torch.from_numpy(np.ascontiguousarray(weights, dtype=np.float32)).view(shape)


def read_int4(
    data: np.ndarray[tuple[int], np.dtype[np.uint8]], quantization: str, shape: tuple[int, ...]
) -> Int4Matrix:
    """The codes, scales and minima of the Q4_0 or Q4_1 blocks in `data`, which it never aliases."""
    groups = (*shape[:-1], shape[-1] // GROUP)
    blocks = torch.from_numpy(data.copy()).view(math.prod(groups), -1)
    scales, nibbles = _halves(blocks, 0), blocks[:, -GROUP // 2 :]
    minima = scales * -8 if quantization == "Q4_0" else _halves(blocks, 2)
    codes = torch.cat((nibbles & 0x0F, nibbles >> 4), -1)
    return Int4Matrix(codes.view(shape), scales.view(groups), minima.view(groups))


def read_int8(data: np.ndarray[tuple[int], np.dtype[np.uint8]], shape: tuple[int, ...]) -> Int8Matrix:
    """The codes and scales of the Q8_0 blocks in `data`, which it never aliases."""
    groups = (*shape[:-1], shape[-1] // GROUP)
    blocks = torch.from_numpy(data.copy()).view(math.prod(groups), -1)
    return Int8Matrix(blocks[:, 2:].contiguous().view(torch.int8).view(shape), _halves(blocks, 0).view(groups))


def _halves(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at byte `start` of each block, as float32 `[num_blocks, 1]`."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()
