"""Token ids are those of the reference implementations: llama.cpp for a GGUF file, transformers for a folder."""

import json
import zlib
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from treadle.runtime.text.tokenizer import load_tokenizer

REFERENCE = json.loads(Path(__file__).with_name("reference_ids.json").read_text())


def checksum(ids):
    return zlib.crc32(" ".join(map(str, ids)).encode())


def test_corpus_is_the_one_that_the_reference_was_made_from(lines):
    assert len(lines) == REFERENCE["num_lines"] >= 2000
    assert zlib.crc32("\0".join(lines).encode()) == REFERENCE["corpus"]


def test_every_line_has_the_ids_of_llama_cpp(smollm2, lines):
    ids = [smollm2.encode(line) for line in lines]
    different = [
        line for line, got, expected in zip(lines, ids, REFERENCE["plain"], strict=True) if checksum(got) != expected
    ]
    assert different == []
    assert sum(map(len, ids)) == REFERENCE["num_ids"]


def test_special_tokens_in_a_line_have_the_ids_of_llama_cpp(smollm2, lines):
    assert len(REFERENCE["special"]) > 50
    for index, expected in REFERENCE["special"].items():
        assert checksum(smollm2.encode(lines[int(index)], special=True)) == expected, lines[int(index)]


def test_every_line_has_the_ids_of_the_model_s_own_pre_tokenizer(smollm2, smollm2_path, lines):
    """SmolLM2's tokenizer.json splits with Digits and ByteLevel, not with llama.cpp's expressions."""
    own = Tokenizer(smollm2._backend.model)
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert [line for line in lines if own.encode(line).ids != smollm2.encode(line)] == []


def test_every_line_comes_back_exactly_but_for_bytes_that_the_vocabulary_lacks(smollm2, lines):
    """SmolLM2 has no token at all for 21 bytes: those that UTF-8 never uses, and some control characters. Both
    reference implementations drop them."""
    missing = set(range(256)) - {smollm2.token_bytes(i)[0] for i in range(256 + 17) if len(smollm2.token_bytes(i)) == 1}
    assert len(missing) == 21
    assert not missing & set(b"\t\n\r !~aZ09") and not missing & set(range(0xC2, 0xF1))
    num_exact = 0
    for line in lines:
        kept = bytes(byte for byte in line.encode() if byte not in missing)
        assert smollm2.decode(smollm2.encode(line)) == kept.decode(errors="replace")
        num_exact += kept == line.encode()
    assert num_exact > len(lines) - 50


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_every_line_has_the_ids_and_the_text_of_transformers(request, kind, lines):
    folder = request.getfixturevalue(f"{kind}_folder")
    tokenizer, reference = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for line in lines:
        ids = tokenizer.encode(line, special=True)
        assert ids == reference.encode(line, add_special_tokens=False)
        text = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids) == text
