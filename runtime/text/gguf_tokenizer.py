"""Builds a tokenizer from the metadata of a GGUF file.

The pre-tokenizers are those of llama.cpp's table (`llama-vocab.cpp`), by the name in `tokenizer.ggml.pre`. Where that
table had to rewrite a model's own regular expression for its engine, the model's own is used here: they differ on the
long s, U+017F, in `(?i:'s)`, and in `tekken` and `gpt-4o` on which letters outside ASCII are capitals.

Where a vocabulary has no token for some byte, both llama.cpp and Hugging Face drop it, but Hugging Face, and so
Treadle, may merge what stood on its two sides. With SmolLM2 this concerns unassigned characters from U+42019 on, and no
others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from treadle.runtime.errors import CorruptModelError, UnsupportedModelError
from treadle.runtime.text.special_text import END_OF_TURN_TOKENS

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer


UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6
"""Values of `tokenizer.ggml.token_type`; a normal token is 1."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+SUFFIX|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*SUFFIX"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_PUNCTUATION}|{_SPACES}"
_TEKKEN = rf"{_CASED.replace('SUFFIX', '')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = rf"{_CASED.replace('SUFFIX', _CONTRACTIONS + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)


class _PreTokenizer(NamedTuple):
    """Patterns that are applied one after the other, each to the pieces that the one before left."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    """Whether a piece that is itself in the vocabulary is taken whole, before any merge."""
    bos: bool = False
    """Whether a prompt begins with the BOS token if the file does not say."""


_SMOLLM_RULE = _PreTokenizer((r"\p{N}", _GPT2))
_GPT2_RULE = _PreTokenizer((_GPT2,))
_QWEN2_RULE = _PreTokenizer((_QWEN2,))
_LLAMA3_RULE = _PreTokenizer((_LLAMA3,), whole_words=True, bos=True)
_GPT4O_RULE = _PreTokenizer((_GPT4O,))

PRE_TOKENIZERS: Mapping[str, _PreTokenizer] = {
    "default": _PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _GPT2_RULE,
    "phi-2": _GPT2_RULE,
    "mpt": _GPT2_RULE,
    "olmo": _GPT2_RULE,
    "exaone4": _GPT2_RULE,
    "smollm": _SMOLLM_RULE,
    "starcoder": _SMOLLM_RULE,
    "refact": _SMOLLM_RULE,
    "command-r": _SMOLLM_RULE,
    "codeshell": _SMOLLM_RULE,
    "exaone": _SMOLLM_RULE,
    "minerva-7b": _SMOLLM_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "falcon3": _LLAMA3_RULE,
    "lfm2": _LLAMA3_RULE,
    "pixtral": _LLAMA3_RULE,
    "dbrx": _PreTokenizer((_LLAMA3,)),
    "smaug-bpe": _PreTokenizer((_LLAMA3,)),
    "chatglm-bpe": _PreTokenizer((_LLAMA3,)),
    "glm4": _PreTokenizer((_LLAMA3,), whole_words=True),
    "qwen2": _QWEN2_RULE,
    "deepseek-r1-qwen": _QWEN2_RULE,
    "megrez": _QWEN2_RULE,
    "stablelm2": _QWEN2_RULE,
    "tekken": _PreTokenizer((_TEKKEN,), whole_words=True, bos=True),
    "gpt-4o": _GPT4O_RULE,
    "llama4": _GPT4O_RULE,
    "deepseek-v3": _PreTokenizer((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3)),
}
"""Pre-tokenizers by the name that a GGUF file gives them."""


class GGUFVocabulary(NamedTuple):
    """A tokenizer built from metadata, with what decoding needs and the backend does not tell.

    `byte_level` says how bytes are written in tokens: GPT-2's alphabet, or SentencePiece's `▁` and `<0x0A>`.
    """

    backend: Backend
    tokens: list[str]
    token_types: list[int]
    byte_level: bool
    space_prefix: bool
    add_bos: bool


def build_gguf_tokenizer(metadata: Mapping[str, Any]) -> GGUFVocabulary:
    """Builds the tokenizer that `metadata` describes.

    Raises `UnsupportedModelError` for a kind of tokenizer or a pre-tokenizer that Treadle does not know, and
    `CorruptModelError` for lists that are missing or contradict each other.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        raise CorruptModelError(
            "the GGUF file has no tokenizer (tokenizer.ggml.model is missing). Convert the model again, with its "
            "tokenizer beside it."
        )
    builder = _BUILDERS.get(model) if isinstance(model, str) else None
    if builder is None:
        raise UnsupportedModelError(
            f"tokenizer.ggml.model is {model!r}; Treadle supports {_listing(_BUILDERS)}. Use a model with one of these."
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    token_types = _numbers(metadata, "tokenizer.ggml.token_type", len(tokens)) or [1] * len(tokens)
    return builder(metadata, tokens, _with_end_of_turn(metadata, tokens, [int(kind) for kind in token_types]))


def _with_end_of_turn(metadata: Mapping[str, Any], tokens: list[str], token_types: list[int]) -> list[int]:
    """`token_types` in which whatever ends a turn is a control token: some converters call it normal. `</s>` is left,
    for in some vocabularies it is ordinary markup."""
    declared = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    names = END_OF_TURN_TOKENS - {"</s>"}
    return [
        CONTROL if token in names or token_id in declared else token_type
        for token_id, (token, token_type) in enumerate(zip(tokens, token_types, strict=True))
    ]


def _build_byte_level(metadata: Mapping[str, Any], tokens: list[str], token_types: list[int]) -> GGUFVocabulary:
    name = metadata.get("tokenizer.ggml.pre", "default")
    rule = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if rule is None:
        raise UnsupportedModelError(
            f"the pre-tokenizer {name!r} (tokenizer.ggml.pre) is unknown to Treadle, which supports "
            f"{_listing(PRE_TOKENIZERS)}. Use a model with one of these."
        )
    merges: list[tuple[str, str]] = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        # A space within a token is written with another letter, so the first space after a letter parts the two.
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise CorruptModelError(f"tokenizer.ggml.merges holds {merge!r}, which is not two tokens. {_REDOWNLOAD}")
        merges.append((left, right))
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    backend = _backend(
        lambda: models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.whole_words), tokens, token_types
    )
    backend.pre_tokenizer = _pre_tokenizer(rule)
    return GGUFVocabulary(
        backend,
        tokens,
        token_types,
        byte_level=True,
        space_prefix=False,
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", rule.bos)),
    )


def _build_sentencepiece(metadata: Mapping[str, Any], tokens: list[str], token_types: list[int]) -> GGUFVocabulary:
    scores = _numbers(metadata, "tokenizer.ggml.scores", len(tokens))
    if scores is None:
        raise CorruptModelError(f"tokenizer.ggml.scores is missing. {_REDOWNLOAD}")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = _merges_from_scores(tokens, scores, token_types, vocabulary)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    unknown_token = tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None
    backend = _backend(
        lambda: models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown_token, fuse_unk=True, byte_fallback=True),
        tokens,
        token_types,
    )
    space_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    replace_spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replace_spaces]) if space_prefix else replace_spaces
    )
    return GGUFVocabulary(
        backend,
        tokens,
        token_types,
        byte_level=False,
        space_prefix=space_prefix,
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", True)),
    )


def _merges_from_scores(
    tokens: Sequence[str], scores: Sequence[float], token_types: Sequence[int], vocabulary: Mapping[str, int]
) -> list[tuple[str, str]]:
    """The merges that a SentencePiece vocabulary implies: every way to put a piece together out of two others, the
    piece with the best score first. As Hugging Face's converter orders them, except that no merge makes a control,
    byte or unused token out of text that looks like one."""
    outside = {CONTROL, UNKNOWN, BYTE, UNUSED}
    usable = {token for token, token_type in zip(tokens, token_types, strict=True) if token_type not in outside}
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        if token not in usable:
            continue
        splits = []
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in usable and right in usable:
                splits.append((left, right))
        splits.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        ranked += [(score, len(left), len(right), left, right) for left, right in splits]
    ranked.sort(key=lambda entry: entry[:3], reverse=True)
    return [(left, right) for _, _, _, left, right in ranked]


def _backend(make_model: Callable[[], models.BPE], tokens: Sequence[str], token_types: Sequence[int]) -> Backend:
    try:
        backend = Backend(make_model())
    # The library raises a bare Exception for merges that do not fit the vocabulary.
    except Exception as error:
        raise CorruptModelError(f"the tokenizer's merges do not fit its vocabulary ({error}). {_REDOWNLOAD}") from error
    added = [
        AddedToken(token, special=token_type != USER_DEFINED, normalized=False)
        for token, token_type in zip(tokens, token_types, strict=True)
        if token_type in (CONTROL, UNKNOWN, USER_DEFINED) and token
    ]
    for special, group in itertools.groupby(added, key=lambda token: token.special):
        (backend.add_special_tokens if special else backend.add_tokens)(list(group))
    return backend


def _pre_tokenizer(rule: _PreTokenizer) -> PreTokenizer:
    steps: list[PreTokenizer] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CorruptModelError(f"{key} is missing or is not a list of strings. {_REDOWNLOAD}")
    return values


def _numbers(metadata: Mapping[str, Any], key: str, length: int) -> list[float] | None:
    values = metadata.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(value, (int, float)) for value in values):
        raise CorruptModelError(f"{key} is not a list of numbers. {_REDOWNLOAD}")
    if len(values) != length:
        raise CorruptModelError(f"{key} has {len(values)} entries for {length} tokens. {_REDOWNLOAD}")
    return values


def _listing(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names))


_REDOWNLOAD = "The file is damaged: download or convert it again."
_BUILDERS: Mapping[str, Callable[[Mapping[str, Any], list[str], list[int]], GGUFVocabulary]] = {
    "gpt2": _build_byte_level,
    "llama": _build_sentencepiece,
}
