"""Loading a tokenizer, which ids mean what, and what text may become."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.runtime.errors import CorruptModelError, InvalidRequestError, ModelNotFoundError, UnsupportedModelError
from treadle.runtime.text.gguf_tokenizer import CONTROL, PRE_TOKENIZERS, USER_DEFINED
from treadle.runtime.text.tokenizer import load_tokenizer, tokenizer_from_gguf

NORMAL, BYTE = 1, 6


def byte_level_metadata(**changes):
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|end|>", *sorted(ByteLevel.alphabet()), "he", "hell", "hello", "ll", "<mark>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL, *[NORMAL] * (len(tokens) - 2), USER_DEFINED],
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o"],
        "tokenizer.ggml.eos_token_id": 0,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def sentencepiece_metadata(pieces, **changes):
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces) - 259)],
        "tokenizer.ggml.token_type": [2, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(pieces) - 259)],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_real_model_knows_what_its_ids_mean(smollm2):
    assert smollm2.vocab_size == 49152
    assert smollm2.bos_token_id == 1
    assert smollm2.eos_token_ids == (2, 0)
    assert smollm2.special_ids == set(range(17))
    assert smollm2.add_bos is False
    assert smollm2.token_bytes(2) == b"<|im_end|>"


def test_folder_knows_what_its_ids_mean(byte_level_tokenizer, sentencepiece_tokenizer):
    end, start, finish = (byte_level_tokenizer.vocab_size - n for n in (5, 4, 3))
    assert byte_level_tokenizer.special_ids == {end, start, finish}
    assert byte_level_tokenizer.bos_token_id == end
    assert byte_level_tokenizer.eos_token_ids == (finish, end)
    assert byte_level_tokenizer.chat_template is not None
    assert sentencepiece_tokenizer.bos_token_id == 1
    assert sentencepiece_tokenizer.eos_token_ids == (2,)
    assert sentencepiece_tokenizer.chat_template is None


def test_text_that_looks_like_a_special_token_stays_text_unless_asked(smollm2, byte_level_tokenizer):
    for tokenizer in (smollm2, byte_level_tokenizer):
        text = "<|im_start|>user<|im_end|>"
        literal = tokenizer.encode(text)
        assert tokenizer.special_ids.isdisjoint(literal)
        assert tokenizer.decode(literal) == text
        special = tokenizer.encode(text, special=True)
        assert special[0] in tokenizer.special_ids
        assert special[-1] == tokenizer.eos_token_ids[0]
        assert tokenizer.decode(special) == "user"
        assert tokenizer.decode(special, skip_special=False) == text


@given(
    parts=st.lists(
        st.sampled_from(["<|", "im_end", "|>", "<|im_end|>", "</", "s>", "<s>", "<unk>", " ", "x", "<0x0A>"])
    )
)
def test_untrusted_text_never_becomes_a_special_id(smollm2, sentencepiece_tokenizer, parts):
    text = "".join(parts)
    for tokenizer in (smollm2, sentencepiece_tokenizer):
        ids = tokenizer.encode(text)
        assert tokenizer.special_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == text


def test_special_token_that_merges_can_make_is_spelled_out():
    tokenizer = tokenizer_from_gguf(byte_level_metadata(token_type=[CONTROL, *[NORMAL] * 258, CONTROL, NORMAL, NORMAL]))
    hello = tokenizer.encode("hello", special=True)
    assert hello == [259]
    spelled = tokenizer.encode("hello")
    assert len(spelled) == 5
    assert tokenizer.decode(spelled) == "hello"


def test_user_defined_tokens_are_found_in_any_text_and_have_text():
    tokenizer = tokenizer_from_gguf(byte_level_metadata())
    assert tokenizer.encode("hello<mark>hello") == [259, 261, 259]
    assert tokenizer.decode([259, 261]) == "hello<mark>"


def test_threads_do_not_see_each_other_s_choice_of_special(smollm2):
    text = "a<|im_end|>b " * 50
    expected = {special: smollm2.encode(text, special=special) for special in (True, False)}

    def work(number):
        special = number % 2 == 0
        return all(smollm2.encode(text, special=special) == expected[special] for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


def test_ids_that_are_not_in_the_vocabulary_leave_no_text(smollm2):
    assert smollm2.decode([-1, 49152, 10**9]) == ""
    assert smollm2.token_bytes(49152) == smollm2.token_bytes(-1) == b""


def test_lone_surrogates_are_refused(smollm2):
    for special in (True, False):
        with pytest.raises(InvalidRequestError, match=r"U\+D800 at character 1"):
            smollm2.encode("a\ud800", special=special)


@given(st.text("ab .\né", min_size=1, max_size=8), st.text("ab .\né", min_size=1, max_size=8))
def test_text_that_continues_a_text_gets_no_space(smollm2, sentencepiece_tokenizer, text, more):
    for tokenizer in (smollm2, sentencepiece_tokenizer):
        assert tokenizer.decode(tokenizer.encode(text) + tokenizer.encode(more, continues=True)) == text + more


def test_sentencepiece_gguf_has_the_ids_of_the_folder(sentencepiece_vocabulary, sentencepiece_tokenizer, lines):
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(sentencepiece_vocabulary))
    assert tokenizer.add_bos
    for line in lines:
        ids = tokenizer.encode(line)
        assert ids == sentencepiece_tokenizer.encode(line)
        assert tokenizer.decode(ids) == line.replace("▁", " ")


def test_sentencepiece_without_space_prefix_keeps_the_first_space(sentencepiece_vocabulary):
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(sentencepiece_vocabulary, add_space_prefix=False))
    for text in ("All", " All", "  All"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("A") != tokenizer.encode(" A")


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-2", "I'm 123  x\n\ny!!", ["I", "'m", " 123", " ", " x", "\n", "\n", "y", "!!"]),
        ("smollm", "a 12b", ["a", " ", "1", "2", "b"]),
        ("llama-bpe", "I'M 12345 x\r\n\n  y(z", ["I", "'M", " ", "123", "45", " x", "\r\n\n", " ", " y", "(z"]),
        ("qwen2", "x123 .\n", ["x", "1", "2", "3", " .\n"]),
        ("default", "a1234$b", ["a", "123", "4", "$", "b"]),
        ("tekken", "HelloWorld12", ["Hello", "World", "1", "2"]),
        ("gpt-4o", "isn't1234", ["isn't", "123", "4"]),
        ("deepseek-v3", "中文abc1234 x", ["中文", "abc", "123", "4", " x"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_do(name, text, pieces):
    tokenizer = tokenizer_from_gguf(
        byte_level_metadata(pre=name, tokens=byte_level_metadata()["tokenizer.ggml.tokens"])
    )
    split = tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in split] == pieces


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_loses_no_text(name, lines):
    tokenizer = tokenizer_from_gguf(byte_level_metadata(pre=name))
    for line in lines[::20]:
        assert tokenizer.decode(tokenizer.encode(line)) == line


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "bert"}, UnsupportedModelError, "gpt2, llama"),
        ({"pre": "nonesuch"}, UnsupportedModelError, "smollm"),
        ({"model": None}, CorruptModelError, "no tokenizer"),
        ({"tokens": "abc"}, CorruptModelError, "tokenizer.ggml.tokens"),
        ({"merges": None}, CorruptModelError, "tokenizer.ggml.merges"),
        ({"merges": ["he"]}, CorruptModelError, "'he'"),
        ({"merges": ["zz yy"]}, CorruptModelError, "do not fit"),
        ({"token_type": [1]}, CorruptModelError, "1 entries for 262 tokens"),
    ],
)
def test_bad_metadata_is_named(changes, error, words):
    with pytest.raises(error, match=words):
        tokenizer_from_gguf(byte_level_metadata(**changes))


def test_nothing_at_the_path(tmp_path):
    with pytest.raises(ModelNotFoundError, match="Check the path"):
        load_tokenizer(tmp_path / "absent.gguf")
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(UnsupportedModelError, match="save_pretrained"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": 1}'])
def test_damaged_tokenizer_json_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CorruptModelError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_unknown_decoder_is_named(tmp_path, byte_level_folder):
    description = json.loads((byte_level_folder / "tokenizer.json").read_text())
    description["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(UnsupportedModelError, match="WordPiece"):
        load_tokenizer(tmp_path)


def test_chat_template_file_comes_before_the_one_in_the_settings(tmp_path, byte_level_folder):
    shutil.copytree(byte_level_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }} {{ eos_token }}")
    assert load_tokenizer(tmp_path).chat_template.render([]) == "file <|endoftext|> <|im_end|>"
