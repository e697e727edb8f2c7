"""The real model's tokenizer, and small ones trained here and saved as Hugging Face folders."""

import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import generate_merges

from treadle.runtime.config import cache_dir
from treadle.runtime.models.registry import resolve
from treadle.runtime.text.tokenizer import load_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def smollm2_path():
    return resolve("smollm2", cache_dir(), pull=True)


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    return load_tokenizer(smollm2_path)


def script(name):
    """A module beside this one. It is written to run elsewhere as well, so it is in no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def lines():
    return script("corpus").lines()


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory, lines):
    """A byte-level BPE as Qwen2 has it, its special tokens beyond the model's own vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(lines, trainer)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens(["<tool_call>", "</tool_call>"])
    folder = tmp_path_factory.mktemp("byte_level")
    backend.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        bos_token={"__type": "AddedToken", "content": "<|endoftext|>", "normalized": False},
        eos_token="<|im_end|>",
        chat_template=TEMPLATE,
        tokenizer_class="PreTrainedTokenizerFast",
    )
    ids = [backend.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    write_json(folder / "generation_config.json", eos_token_id=ids)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_vocabulary(lines):
    """The pieces of a vocabulary like Llama 2's, in order: control tokens, bytes, then the rest, the best first."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=1600, show_progress=False, limit_alphabet=300, max_token_length=12)
    backend.train_from_iterator([line[:60] for line in lines[:600]], trainer)
    vocabulary = backend.get_vocab()
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    letters = [piece for piece in pieces if len(piece) == 1]
    longer = [piece for piece in pieces if len(piece) > 1]
    return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *longer, *letters]


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory, sentencepiece_vocabulary):
    """A SentencePiece-like BPE with byte fallback, converted as transformers converts Llama 2's."""
    vocabulary = {piece: i for i, piece in enumerate(sentencepiece_vocabulary)}
    scores = {piece: -i for i, piece in enumerate(sentencepiece_vocabulary)}
    merges = generate_merges(vocabulary, scores.items(), skip_tokens=sentencepiece_vocabulary[:259])
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    folder = tmp_path_factory.mktemp("sentencepiece")
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    write_json(folder / "config.json", eos_token_id=2)
    return folder


def write_json(path, **content):
    path.write_text(json.dumps(content))


@pytest.fixture(scope="session")
def byte_level_tokenizer(byte_level_folder):
    return load_tokenizer(byte_level_folder)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(sentencepiece_folder):
    return load_tokenizer(sentencepiece_folder)
