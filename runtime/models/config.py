"""What a decoder looks like: the shape of a model, read from `config.json` or GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Weights = Literal["auto", "full", "int8", "int4", "int4-only"]
"""Which matrices of the layers are kept in codes, see `EngineConfig`."""
WEIGHTS: tuple[Weights, ...] = ("auto", "full", "int8", "int4", "int4-only")
INT4_WEIGHTS: tuple[Weights, ...] = ("int4", "int4-only")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was trained on.

    `linear` divides every frequency by `factor`. `llama3` divides low frequencies by `factor`, keeps high ones and
    blends between (Llama 3.1 report). `yarn` does so by the number of rotations, and scales attention (YaRN,
    arXiv 2309.00071). `factors` are explicit divisors, one for each frequency, as GGUF stores them.
    """

    kind: Literal["linear", "llama3", "yarn", "factors"]
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a Llama-like decoder: grouped-query attention with rotary positions, RMSNorm and SwiGLU.

    One class covers Llama, Mistral, Qwen2, Qwen2.5 and Qwen3: they differ in `qkv_bias` (Qwen2), `qk_norm` (Qwen3)
    and numbers only.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    sliding_window: int | None = None

    @property
    def num_parameters(self) -> int:
        """Number of weights, biases and norms left out."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * (attention + mlp) + embeddings
