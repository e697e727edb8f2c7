"""A model folder with random weights and a tokenizer that knows bytes: small enough for any process to load at once."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from treadle.runtime.models import RandomCheckpoint
from treadle.runtime.models.config import ModelConfig

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = ModelConfig(
    architecture="llama",
    vocab_size=256 + len(SPECIAL),
    hidden_size=64,
    intermediate_size=192,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_context=2048,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)


def write_small_model(folder: Path) -> Path:
    """Writes it in the Hugging Face format. Half of what it says is no text, and is held back or replaced."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", eos_token="<|im_end|>", chat_template=TEMPLATE)
    _write(
        folder / "config.json",
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.intermediate_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_kv_heads,
        head_dim=SHAPE.head_dim,
        max_position_embeddings=SHAPE.max_context,
        rms_norm_eps=SHAPE.rms_norm_eps,
        rope_theta=SHAPE.rope_theta,
        tie_word_embeddings=False,
    )
    weights = RandomCheckpoint(SHAPE)
    save_file({name: weights.tensor(name) for name in weights.names()}, folder / "model.safetensors")
    return folder


def _write(path: Path, **content: object) -> None:
    path.write_text(json.dumps(content))
