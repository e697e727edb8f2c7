"""A model in the Hugging Face format, for peers that know no other: bfloat16 weights without a tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from treadle.runtime.models.checkpoint import Checkpoint
from treadle.runtime.models.config import ModelConfig, RopeScaling
from treadle.runtime.models.huggingface_config import SUPPORTED_MODELS


def export_model(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes a model into a folder that is there. Exits for one whose rotary positions the format cannot describe."""
    scaling = checkpoint.config.rope_scaling
    if scaling is not None and scaling.kind == "factors":
        sys.exit(f"{checkpoint.path}: explicit rotary factors have no place in config.json; give the original folder")
    (folder / "config.json").write_text(json.dumps(_config(checkpoint.config), indent=2))
    tensors = {name: checkpoint.tensor(name).to(torch.bfloat16).contiguous() for name in checkpoint.names()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _config(model: ModelConfig) -> dict[str, Any]:
    scaling = {"rope_scaling": _scaling(model.rope_scaling)} if model.rope_scaling is not None else {}
    return {
        **scaling,
        "architectures": [SUPPORTED_MODELS[model.architecture]],
        "model_type": model.architecture,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_context,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "hidden_act": "silu",
        "attention_bias": model.o_bias,
        "mlp_bias": model.mlp_bias,
        "tie_word_embeddings": model.tied_embeddings,
        "sliding_window": model.sliding_window,
        "dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _scaling(scaling: RopeScaling) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        found["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        found |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        found |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        found |= {"attention_factor": scaling.attention_factor} if scaling.attention_factor is not None else {}
    return found
