"""GGML blocks to float32. The common 32-element blocks are done by torch, the others by the `gguf` package.

One block of 32 weights, quantised as in ggml-quants.c (low nibbles first: weights 0..15, then 16..31):

    Q4_0  | d: f16 | 16 bytes of nibbles |            w = d * (q - 8)
    Q4_1  | d: f16 | m: f16 | 16 bytes of nibbles |   w = d * q + m
    Q8_0  | d: f16 | 32 x int8 |                      w = d * q
"""

from __future__ import annotations

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize

_BLOCK = 32


def dequantize(
    data: np.ndarray[tuple[int], np.dtype[np.uint8]], quantization: str, shape: tuple[int, ...]
) -> torch.Tensor:
    """The float32 tensor of `shape` that `data`, the stored bytes, stands for. It never aliases `data`.

    Equal, bit for bit, to the `gguf` package's `dequantize`, which takes about four times as long.
    """
    owned = torch.from_numpy(data.copy())
    match quantization:
        case "F32":
            return owned.view(torch.float32).view(shape)
        case "F16":
            return owned.view(torch.float16).float().view(shape)
        case "BF16":
            return owned.view(torch.bfloat16).float().view(shape)
        case "Q4_0":
            return _q4_0(owned.view(-1, 18)).view(shape)
        case "Q4_1":
            return _q4_1(owned.view(-1, 20)).view(shape)
        case "Q8_0":
            return _q8_0(owned.view(-1, 34)).view(shape)
        case _:
            rows = data.reshape(*shape[:-1], -1)
            weights = gguf_dequantize(rows, GGMLQuantizationType[quantization])
            return torch.from_numpy(np.ascontiguousarray(weights, dtype=np.float32)).view(shape)


def _halves(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at byte `start` of each block, as float32 `[num_blocks, 1]`."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """`[num_blocks, 16]` bytes to `[num_blocks, 32]` float32 in 0..15."""
    weights = torch.empty(packed.shape[0], _BLOCK)
    weights[:, :16] = packed & 0x0F
    weights[:, 16:] = packed >> 4
    return weights


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(_halves(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    # NOTE: not addcmul_, which may fuse and then differs from the reference in the last bit.
    return _nibbles(blocks[:, 4:]).mul_(_halves(blocks, 0)).add_(_halves(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_halves(blocks, 0))
