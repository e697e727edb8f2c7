"""Models with random weights: the speed of a real model without its files, and models small enough for tests."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from treadle.runtime.errors import CorruptModelError
from treadle.runtime.models.config import ModelConfig, RopeScaling
from treadle.runtime.models.layout import Shape, tensor_shapes

if TYPE_CHECKING:
    import torch

    from treadle.kernels.codes import Int4Matrix, Int8Matrix

_NOISE = 0.02


class RandomCheckpoint:
    """A `Checkpoint` whose weights are noise. A tensor depends on the seed, its name and its shape, nothing else.

    Matrices have standard deviation `1 / sqrt(in_features)`, which keeps activations and logits near unit size at any
    depth; norms lie near 1, biases near 0.
    """

    path: Path | None = None
    config: ModelConfig

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self._shapes: dict[str, Shape] = dict(tensor_shapes(config))

    def names(self) -> Collection[str]:
        """Every tensor of a model of this shape, by its Hugging Face name."""
        return self._shapes.keys()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in float32, the same at every call. Raises `CorruptModelError` for a name it does not have."""
        if name not in self._shapes:
            raise CorruptModelError(f"the random model has no tensor {name!r}.")
        shape = self._shapes[name]
        if len(shape) == 2:
            return self._noise(name, shape, 1 / math.sqrt(shape[1]))
        noise = self._noise(name, shape, _NOISE)
        return noise if name.endswith(".bias") else noise.add_(1.0)

    def codes(self, name: str) -> Int4Matrix | Int8Matrix | None:
        """None: no matrix is made in codes."""
        return None

    def _noise(self, name: str, shape: Shape, std: float) -> torch.Tensor:
        """Uniform noise from 16 random bits a weight: over twice as fast as normal noise, for models of billions."""
        import numpy as np
        import torch

        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = np.random.SFC64(int.from_bytes(digest[:16], "little"))
        size = math.prod(shape)
        words = np.asarray(generator.random_raw(-(-size // 4)), dtype="<u8")
        levels = torch.from_numpy(words.view("<i2")[:size])
        limit = std * math.sqrt(3)
        return levels.float().add_(0.5).mul_(limit / 2**15).view(shape)


_LLAMA3_ROPE = RopeScaling("llama3", factor=8.0, original_context=8192, low_freq_factor=1.0, high_freq_factor=4.0)
_LLAMA_8B = ModelConfig(
    architecture="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_context=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=_LLAMA3_ROPE,
)
_QWEN3_8B = ModelConfig(
    architecture="qwen3",
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_context=40960,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    qk_norm=True,
)
_TINY_LLAMA = ModelConfig(
    architecture="llama",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=192,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_context=2048,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=replace(_LLAMA3_ROPE, original_context=512),
)

SHAPES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "llama-3.1-8b": _LLAMA_8B,
        "llama-3.2-1b": replace(
            _LLAMA_8B,
            hidden_size=2048,
            intermediate_size=8192,
            num_layers=16,
            head_dim=64,
            rope_scaling=replace(_LLAMA3_ROPE, factor=32.0),
            tied_embeddings=True,
        ),
        "mistral-7b-v0.3": replace(
            _LLAMA_8B, architecture="mistral", vocab_size=32768, max_context=32768, rope_theta=1e6, rope_scaling=None
        ),
        "qwen2.5-0.5b": ModelConfig(
            architecture="qwen2",
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_layers=24,
            num_heads=14,
            num_kv_heads=2,
            head_dim=64,
            max_context=32768,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            qkv_bias=True,
            tied_embeddings=True,
        ),
        "qwen3-0.6b": replace(
            _QWEN3_8B, hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16, tied_embeddings=True
        ),
        "qwen3-8b": _QWEN3_8B,
        "smollm2-135m": ModelConfig(
            architecture="llama",
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            max_context=8192,
            rms_norm_eps=1e-5,
            rope_theta=100000.0,
            tied_embeddings=True,
        ),
        "tiny-llama": _TINY_LLAMA,
        "tiny-qwen2.5": replace(
            _TINY_LLAMA, architecture="qwen2", rope_scaling=None, rms_norm_eps=1e-6, qkv_bias=True, tied_embeddings=True
        ),
        "tiny-qwen3": replace(
            _TINY_LLAMA, architecture="qwen3", rope_scaling=None, rms_norm_eps=1e-6, qk_norm=True, head_dim=32
        ),
        "tiny-mistral": replace(_TINY_LLAMA, architecture="mistral", rope_scaling=None, num_layers=3, num_heads=8),
    }
)
"""Shapes of known models, and of tiny ones for tests (`tiny-...`: at most 200 thousand weights)."""
