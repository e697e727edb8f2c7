"""Models in the GGUF format, under Hugging Face names and in Hugging Face layout."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from treadle.runtime.errors import CorruptModelError, UnsupportedModelError
from treadle.runtime.models.config import ModelConfig, RopeScaling
from treadle.runtime.models.gguf_file import GGUFFile, MetadataValue, TensorInfo
from treadle.runtime.models.layout import check_tensors

if TYPE_CHECKING:
    import torch

    from treadle.kernels.codes import Int4Matrix, Int8Matrix

SUPPORTED_ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Values of `general.architecture` that Treadle runs; Mistral models are stored as `llama`."""

_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"
_UNUSED = re.compile(r"blk\.\d+\.attn_rot_embd\.weight|rope_freqs\.weight")


class GGUFCheckpoint:
    """A model in a GGUF file, as a `Checkpoint`: `tensor` gives float32.

    The converter of llama.cpp stores the query and key rows of Llama models permuted, for rotary pairs that lie side
    by side; reading puts them back in the order that Hugging Face uses. Raises as `GGUFFile` does, and
    `UnsupportedModelError` for an architecture that Treadle cannot run.
    """

    path: Path | None
    config: ModelConfig
    file: GGUFFile

    def __init__(self, path: Path | str) -> None:
        self.file = GGUFFile(path)
        self.path = self.file.path
        self.config = _ConfigReader(self.file).read()
        stored = {name: info.shape for name, info in self.file.tensors.items()}
        self._shapes = check_tensors(self.config, stored, str(self.file.path), stored_name)
        self._refuse_unknown_tensors()

    def names(self) -> Collection[str]:
        """Every tensor that `tensor` can give, by its Hugging Face name."""
        return self._shapes.keys()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in float32. Raises `CorruptModelError` if the model has none of this name."""
        from treadle.runtime.models.dequantize import dequantize

        info = self._info(name)
        return self._in_order(name, dequantize(self.file.raw(info.name), info.quantization, info.shape))

    def codes(self, name: str) -> Int4Matrix | Int8Matrix | None:
        """The codes of a matrix in Q4_0, Q4_1 or Q8_0. Raises `CorruptModelError` if there is none of this name."""
        from treadle.kernels.codes import Int4Matrix, Int8Matrix
        from treadle.runtime.models.dequantize import INT4_QUANTIZATIONS, read_int4, read_int8

        info = self._info(name)
        if info.quantization in INT4_QUANTIZATIONS:
            int4 = read_int4(self.file.raw(info.name), info.quantization, info.shape)
            return Int4Matrix(*(self._in_order(name, part) for part in int4))
        if info.quantization == "Q8_0":
            int8 = read_int8(self.file.raw(info.name), info.shape)
            return Int8Matrix(*(self._in_order(name, part) for part in int8))
        return None

    def _info(self, name: str) -> TensorInfo:
        if name not in self._shapes:
            raise CorruptModelError(f"{self.file.path}: the model has no tensor {name!r}.")
        return self.file.tensors[stored_name(name)]

    def _in_order(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The rows of a tensor in the order that Hugging Face uses."""
        if self.config.architecture == "llama":
            if ".q_proj." in name:
                return unpermute(rows, self.config.num_heads)
            if ".k_proj." in name:
                return unpermute(rows, self.config.num_kv_heads)
        return rows

    def _refuse_unknown_tensors(self) -> None:
        """A tensor left unread would be a part of the model left out, and wrong answers without a word."""
        used = {stored_name(name) for name in self._shapes}
        unknown = [name for name in self.file.tensors if name not in used and not _UNUSED.fullmatch(name)]
        if unknown:
            raise UnsupportedModelError(
                f"{self.file.path}: Treadle does not know what to do with tensor {unknown[0]!r}"
                f"{f' and {len(unknown) - 1} others' if len(unknown) > 1 else ''}. "
                f"It runs plain {', '.join(SUPPORTED_ARCHITECTURES)} models: choose another file."
            )


def stored_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor name: `model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    if match := _LAYER_NAME.fullmatch(name):
        layer, module, suffix = match.groups()
        return f"blk.{layer}.{_LAYER_NAMES[module]}.{suffix}"
    return _TOP_NAMES[name]


def unpermute(weights: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of each head from interleaved rotary pairs (0, 1, 2, ...) to split halves (0, 2, ..., 1, 3, ...).

    `weights` is `[num_heads * head_dim, in_features]` or a bias `[num_heads * head_dim]`.
    """
    pairs = weights.view(num_heads, -1, 2, *weights.shape[1:])
    return pairs.transpose(1, 2).reshape(weights.shape)


class _ConfigReader:
    """Makes a `ModelConfig` of metadata and tensor shapes."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = self._architecture()

    def read(self) -> ModelConfig:
        self._refuse_variants()
        hidden_size, num_heads = self._count("embedding_length"), self._count("attention.head_count")
        head_dim = self._head_dim(hidden_size, num_heads)
        num_kv_heads = self._count("attention.head_count_kv", default=num_heads)
        if num_heads % num_kv_heads:
            raise self._corrupt(f"{num_heads} heads cannot share {num_kv_heads} key-value heads")
        scaling = self._rope_scaling(head_dim)
        context = self._count("context_length")
        if scaling is not None and scaling.kind == "yarn":
            context = max(context, int(scaling.factor * scaling.original_context))
        window = self._count("attention.sliding_window", default=context, least=0)
        tensors = self.file.tensors
        return ModelConfig(
            architecture=self.architecture,
            vocab_size=self._vocab_size(),
            hidden_size=hidden_size,
            intermediate_size=self._count("feed_forward_length"),
            num_layers=self._count("block_count"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_context=context,
            rms_norm_eps=self._number("attention.layer_norm_rms_epsilon"),
            rope_theta=self._number("rope.freq_base", default=10000.0),
            rope_scaling=scaling,
            qkv_bias=self.architecture == "qwen2" or "blk.0.attn_q.bias" in tensors,
            o_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_up.bias" in tensors,
            qk_norm=self.architecture == "qwen3",
            tied_embeddings="output.weight" not in tensors,
            sliding_window=window if 0 < window < context else None,
        )

    def _architecture(self) -> str:
        architecture = self.file.metadata.get("general.architecture")
        if architecture not in SUPPORTED_ARCHITECTURES:
            raise UnsupportedModelError(
                f"{self.file.path}: architecture {architecture!r}; Treadle runs {', '.join(SUPPORTED_ARCHITECTURES)} "
                "(Mistral models are stored as llama)."
            )
        return str(architecture)

    def _refuse_variants(self) -> None:
        path = self.file.path
        if self._count("expert_count", default=0, least=0):
            raise UnsupportedModelError(f"{path}: a mixture of experts; Treadle runs dense models only.")
        parts = self.file.metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise UnsupportedModelError(
                f"{path}: one of {parts} parts of a split model. Join them with `llama-gguf-split --merge`."
            )

    def _head_dim(self, hidden_size: int, num_heads: int) -> int:
        head_dim = self._count("attention.key_length", default=max(1, hidden_size // num_heads))
        if self._count("attention.value_length", default=head_dim) != head_dim:
            raise UnsupportedModelError(f"{self.file.path}: keys and values of different lengths.")
        if self._count("rope.dimension_count", default=head_dim) != head_dim:
            raise UnsupportedModelError(f"{self.file.path}: rotary positions on a part of each head only.")
        if head_dim % 2:
            raise self._corrupt(f"heads of {head_dim} dimensions cannot be rotated: the number is odd")
        return head_dim

    def _vocab_size(self) -> int:
        tokens = self.file.metadata.get("tokenizer.ggml.tokens")
        embeddings = self.file.tensors.get("token_embd.weight")
        rows = embeddings.shape[0] if embeddings else 1
        return self._count("vocab_size", default=len(tokens) if isinstance(tokens, list) and tokens else rows)

    def _rope_scaling(self, head_dim: int) -> RopeScaling | None:
        factors = self._rope_factors(head_dim)
        kind = self._get("rope.scaling.type")
        if kind is None and self._get("rope.scale_linear") is not None:
            kind = "linear"
        if kind in (None, "none"):
            return RopeScaling("factors", factors=factors) if factors else None
        if kind not in ("linear", "yarn") or factors:
            raise UnsupportedModelError(
                f"{self.file.path}: rotary scaling {kind!r}{' with frequency factors' if factors else ''}; "
                "Treadle knows linear, yarn and frequency factors, one at a time."
            )
        legacy_factor = self._number("rope.scale_linear", default=1.0)
        factor = self._number("rope.scaling.factor", default=legacy_factor)
        if kind == "linear":
            return RopeScaling("linear", factor=factor)
        return self._yarn(factor)

    def _yarn(self, factor: float) -> RopeScaling:
        magnitude = self._number("rope.scaling.attn_factor", default=1.0)
        return RopeScaling(
            "yarn",
            factor=factor,
            original_context=self._count("rope.scaling.original_context_length", default=self._count("context_length")),
            beta_fast=self._number("rope.scaling.yarn_beta_fast", default=32.0),
            beta_slow=self._number("rope.scaling.yarn_beta_slow", default=1.0),
            attention_factor=magnitude * (1 + 0.1 * math.log(factor)) if magnitude != 1.0 and factor > 1 else None,
        )

    def _rope_factors(self, head_dim: int) -> tuple[float, ...]:
        info = self.file.tensors.get(_ROPE_FACTORS)
        if info is None:
            return ()
        if info.quantization != "F32" or info.shape != (head_dim // 2,):
            raise self._corrupt(f"{_ROPE_FACTORS} is not {head_dim // 2} float32 numbers")
        factors = tuple(self.file.raw(_ROPE_FACTORS).view("<f4").tolist())
        if not all(0 < factor < float("inf") for factor in factors):
            raise self._corrupt(f"{_ROPE_FACTORS} holds numbers that are not positive")
        return factors

    def _get(self, key: str) -> MetadataValue | None:
        return self.file.metadata.get(f"{self.architecture}.{key}")

    def _count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number; a list of equal ones, which some converters write for each layer, counts as one."""
        value = self._get(key)
        if value is None:
            value = default
        if isinstance(value, list) and value:
            if len(set(value)) > 1:
                raise UnsupportedModelError(f"{self.file.path}: {key} differs from layer to layer.")
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise self._corrupt(f"{self.architecture}.{key} is {value!r}, not a whole number from {least}")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._get(key)
        if value is None:
            value = default
        if not isinstance(value, int | float) or not 0 < value < 1e15:
            raise self._corrupt(f"{self.architecture}.{key} is {value!r}, not a positive number")
        return float(value)

    def _corrupt(self, what: str) -> CorruptModelError:
        return CorruptModelError(f"{self.file.path}: {what}. Get the file again, or convert the model again.")
