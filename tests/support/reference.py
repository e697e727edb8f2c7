"""The same model in `transformers`, and how its greedy choice compares with ours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers

from treadle.runtime.models.checkpoint import Checkpoint
from treadle.runtime.models.config import ModelConfig

TIE = 1e-3


def reference_model(checkpoint: Checkpoint, family: str) -> torch.nn.Module:
    """A float32 model of a `transformers` family (Llama, Qwen2, Qwen3, Mistral) with the checkpoint's weights."""
    config = reference_config(checkpoint.config, family)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    weights = {name: checkpoint.tensor(name).float() for name in checkpoint.names()}
    if checkpoint.config.tied_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True)
    return model.float().eval()


def reference_config(config: ModelConfig, family: str) -> transformers.PretrainedConfig:
    options = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied_embeddings,
    }
    if family == "Mistral":
        options["sliding_window"] = config.sliding_window
    scaling = config.rope_scaling
    if scaling is not None:
        assert scaling.kind == "llama3"
        options["rope_parameters"] = {
            "rope_type": "llama3",
            "rope_theta": config.rope_theta,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return getattr(transformers, f"{family}Config")(**options)


@dataclass
class Agreement:
    """How many positions were compared, and at how many the reference would have chosen another, nearly tied, token."""

    positions: int = 0
    ties: int = 0

    @torch.inference_mode()
    def check(self, model: torch.nn.Module, prompt: list[int], generated: list[int]) -> None:
        """Asserts that each generated token is the reference's own choice after the same tokens."""
        logits = model(torch.tensor([prompt + generated])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2, dim=-1)
        for index, token in enumerate(generated):
            self.positions += 1
            if token != int(best.indices[index, 0]):
                gap = float(best.values[index, 0] - best.values[index, 1])
                assert gap < TIE, f"position {index}: {token}, reference {int(best.indices[index, 0])}, gap {gap}"
                self.ties += 1
