"""The vocabularies that grammars are compiled for: a real one, one with tags as tokens, and bytes alone."""

import pytest

from treadle.grammar.compiler import Compiler
from treadle.grammar.vocabulary import Vocabulary
from treadle.runtime.config import cache_dir
from treadle.runtime.models.registry import resolve
from treadle.runtime.text.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(resolve("smollm2", cache_dir(), pull=True))


def pieces(tokenizer):
    return [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]


@pytest.fixture(scope="session")
def vocabulary(tokenizer):
    """SmolLM2's: it writes tool calls in ordinary tokens. The logits are wider than the vocabulary."""
    return Vocabulary(pieces(tokenizer), tokenizer.special_ids, tokenizer.eos_token_ids, tokenizer.vocab_size + 47)


@pytest.fixture(scope="session")
def tagged_vocabulary(tokenizer):
    """The same with tool tags as single tokens that are not special, as Qwen has them."""
    texts = [*pieces(tokenizer), b"<tool_call>", b"</tool_call>"]
    return Vocabulary(texts, tokenizer.special_ids, tokenizer.eos_token_ids, len(texts))


@pytest.fixture(scope="session")
def byte_vocabulary():
    """All bytes, a few longer tokens that cross borders, and special tokens whose text is tempting."""
    texts = [bytes([i]) for i in range(256)]
    texts += [b"<|end|>", b"<|im_start|>", b'{"', b'": ', b'",', b"}}", b"}\n", b"call>", b"call>x", b"<tool", b">\n<"]
    return Vocabulary(texts, frozenset({256, 257}), (256,), len(texts) + 5)


@pytest.fixture(scope="session")
def compiler(vocabulary):
    return Compiler(vocabulary)


@pytest.fixture(scope="session")
def tagged_compiler(tagged_vocabulary):
    return Compiler(tagged_vocabulary)


@pytest.fixture(scope="session")
def byte_compiler(byte_vocabulary):
    return Compiler(byte_vocabulary)
