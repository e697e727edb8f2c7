"""`config.json` of a Hugging Face model, read into a `ModelConfig`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from treadle.runtime.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from treadle.runtime.models.config import ModelConfig, RopeScaling

SUPPORTED_MODELS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Model types that Treadle runs, with the class that transformers runs them by."""

_DEFAULT_MAX_CONTEXT = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_DEFAULT_HEAD_DIM = {"qwen3": 128}
_DEFAULT_SLIDING_WINDOW = 4096


def read_config(folder: Path) -> ModelConfig:
    """The shape of the model in `folder`.

    Raises `ModelNotFoundError` without a `config.json`, `CorruptModelError` if it makes no sense, and
    `UnsupportedModelError` if it asks for something that Treadle does not do.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelNotFoundError(f"{folder}: has no config.json. Give the folder of a model.") from None
    except (ValueError, RecursionError) as error:
        raise CorruptModelError(f"{path}: not JSON ({error}). Download it again.") from error
    if not isinstance(values, dict):
        raise CorruptModelError(f"{path}: not a JSON object. Download it again.")
    return _Config(path, values).read()


class _Config:
    """The values of one `config.json`, taken out with their types checked."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def read(self) -> ModelConfig:
        kind = self._architecture()
        self._refuse_variants()
        hidden_size, num_heads = self._count("hidden_size"), self._count("num_attention_heads")
        num_kv_heads = self._count("num_key_value_heads", default=_DEFAULT_KV_HEADS.get(kind, num_heads))
        head_dim = self._count("head_dim", default=_DEFAULT_HEAD_DIM.get(kind, max(1, hidden_size // num_heads)))
        if num_heads % num_kv_heads:
            self._corrupt(f"{num_heads} heads cannot share {num_kv_heads} key-value heads")
        if head_dim % 2:
            self._corrupt(f"heads of {head_dim} dimensions cannot be rotated: the number is odd")
        num_layers = self._count("num_hidden_layers")
        theta, scaling = self._rope()
        context = self._count("max_position_embeddings", default=_DEFAULT_MAX_CONTEXT[kind])
        window = self._sliding_window(kind, num_layers)
        if scaling is not None and scaling.kind == "yarn":
            context = max(context, int(scaling.factor * scaling.original_context))
        bias = kind in ("llama", "qwen3") and self._flag("attention_bias")
        return ModelConfig(
            architecture=kind,
            vocab_size=self._count("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=self._count("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_context=context,
            rms_norm_eps=self._number(self.values, "rms_norm_eps", default=1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            qkv_bias=bias or kind == "qwen2",
            o_bias=bias,
            mlp_bias=kind == "llama" and self._flag("mlp_bias"),
            qk_norm=kind == "qwen3",
            tied_embeddings=self._flag("tie_word_embeddings"),
            sliding_window=window if window is not None and window < context else None,
        )

    def _architecture(self) -> str:
        kind, classes = self.values.get("model_type"), self.values.get("architectures")
        expected = SUPPORTED_MODELS.get(kind) if isinstance(kind, str) else None
        if expected is None or (isinstance(classes, list) and classes and expected not in classes):
            raise UnsupportedModelError(
                f"{self.path}: model type {kind!r}, architectures {classes!r}; Treadle runs "
                f"{', '.join(SUPPORTED_MODELS.values())}."
            )
        return str(kind)

    def _refuse_variants(self) -> None:
        activation = self.values.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            self._unsupported(f"activation {activation!r}; Treadle knows silu")
        if self.values.get("quantization_config"):
            self._unsupported("the weights are quantised. Use the unquantised model, or a GGUF file of it")
        if self.values.get("partial_rotary_factor") not in (None, 1, 1.0):
            self._unsupported("rotary positions on a part of each head only")

    def _sliding_window(self, kind: str, num_layers: int) -> int | None:
        """The attention window in tokens if all layers have it. Treadle has one window a model, not one a layer."""
        if kind == "llama" or (kind != "mistral" and not self._flag("use_sliding_window")):
            return None
        if "sliding_window" in self.values and self.values["sliding_window"] is None:
            return None
        layer_types = self.values.get("layer_types")
        if isinstance(layer_types, list) and len(layer_types) == num_layers:
            num_sliding = layer_types.count("sliding_attention")
        elif kind == "mistral":
            num_sliding = num_layers
        else:
            num_sliding = num_layers - min(num_layers, self._count("max_window_layers", default=28, least=0))
        if num_sliding == 0:
            return None
        if num_sliding < num_layers:
            self._unsupported("a sliding window in some layers only")
        return self._count("sliding_window", default=_DEFAULT_SLIDING_WINDOW)

    def _rope(self) -> tuple[float, RopeScaling | None]:
        """Rotary base and scaling: from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
        merged: dict[str, Any] = {}
        for key in ("rope_scaling", "rope_parameters"):
            value = self.values.get(key) or {}
            if not isinstance(value, dict):
                self._corrupt(f"{key} is {value!r}, not an object")
            merged |= value
        theta = self._number(merged, "rope_theta", default=self._number(self.values, "rope_theta", default=10000.0))
        if merged.get("partial_rotary_factor") not in (None, 1, 1.0):
            self._unsupported("rotary positions on a part of each head only")
        kind = merged.get("rope_type", merged.get("type", "default"))
        if kind == "default":
            return theta, None
        if kind not in ("linear", "llama3", "yarn"):
            self._unsupported(f"rotary scaling {kind!r}; Treadle knows linear, llama3 and yarn")
        return theta, self._scaling(kind, merged)

    def _scaling(self, kind: str, values: dict[str, Any]) -> RopeScaling:
        factor = self._number(values, "factor")
        if kind == "linear":
            return RopeScaling("linear", factor=factor)
        trained_context = self._number(self.values, "max_position_embeddings", default=0.0, least=-1)
        original = int(self._number(values, "original_max_position_embeddings", default=trained_context))
        if kind == "llama3":
            low = self._number(values, "low_freq_factor", default=1.0)
            high = self._number(values, "high_freq_factor", default=4.0)
            if low >= high:
                self._corrupt(f"low_freq_factor {low} is not below high_freq_factor {high}")
            return RopeScaling(
                "llama3", factor=factor, original_context=original, low_freq_factor=low, high_freq_factor=high
            )
        if values.get("truncate", True) is not True:
            self._unsupported("yarn without truncation")
        return RopeScaling(
            "yarn",
            factor=factor,
            original_context=original,
            beta_fast=self._number(values, "beta_fast", default=32.0),
            beta_slow=self._number(values, "beta_slow", default=1.0),
            attention_factor=self._yarn_attention_factor(values, factor),
        )

    def _yarn_attention_factor(self, values: dict[str, Any], factor: float) -> float | None:
        if values.get("attention_factor") is not None:
            return self._number(values, "attention_factor")
        if values.get("mscale") and values.get("mscale_all_dim"):
            grow = 0.1 * math.log(max(factor, 1.0))
            return (self._number(values, "mscale") * grow + 1) / (self._number(values, "mscale_all_dim") * grow + 1)
        return None

    def _flag(self, key: str) -> bool:
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            self._corrupt(f"{key} is {value!r}, not true or false")
        return value

    def _count(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            self._corrupt(f"{key} is {value!r}, not a whole number from {least}")
        return value

    def _number(self, values: dict[str, Any], key: str, default: float | None = None, least: float = 0) -> float:
        value = values.get(key)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool) or not least < value < 1e15:
            self._corrupt(f"{key} is {value!r}, not a positive number")
        return float(value)

    def _corrupt(self, what: str) -> NoReturn:
        raise CorruptModelError(f"{self.path}: {what}. Download it again, or correct it.")

    def _unsupported(self, what: str) -> NoReturn:
        raise UnsupportedModelError(f"{self.path}: {what}.")
