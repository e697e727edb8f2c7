"""Rotary position angles, and the ways in which models stretch them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from treadle.runtime.models.config import ModelConfig, RopeScaling


class Rope:
    """The angles by which a model turns queries and keys."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        frequencies, self._amplitude = 1.0 / config.rope_theta**exponents, 1.0
        if config.rope_scaling is not None:
            frequencies, self._amplitude = _scale(frequencies, config.rope_scaling, config)
        self._frequencies = torch.cat((frequencies, frequencies)).to(device)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `[T]` positions, each `[T, 1, head_dim]`, both halves of a head alike."""
        turned = (positions[:, None] * self._frequencies)[:, None, :]
        return (turned.cos() * self._amplitude).to(dtype), (turned.sin() * self._amplitude).to(dtype)


def _scale(frequencies: Tensor, scaling: RopeScaling, config: ModelConfig) -> tuple[Tensor, float]:
    match scaling.kind:
        case "linear":
            return frequencies / scaling.factor, 1.0
        case "factors":
            return frequencies / torch.tensor(scaling.factors), 1.0
        case "llama3":
            return _llama3(frequencies, scaling), 1.0
        case "yarn":
            return _yarn(frequencies, scaling, config)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Keeps what turns often within the original context, divides what turns seldom, and blends between."""
    turns = scaling.original_context * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _yarn(frequencies: Tensor, scaling: RopeScaling, config: ModelConfig) -> tuple[Tensor, float]:
    """YaRN, arXiv 2309.00071, section 3.2: the same by dimension, and a larger amplitude for longer contexts."""
    size, base = config.head_dim, config.rope_theta

    def dimension(turns: float) -> float:
        return size * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), size - 1)
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    scaled = ramp * frequencies / scaling.factor + (1 - ramp) * frequencies
    amplitude = scaling.attention_factor
    if amplitude is None:
        amplitude = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return scaled, amplitude
