"""Token ids from text and text from token ids, for a GGUF file or a Hugging Face-style folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel

from treadle.runtime.errors import (
    CorruptModelError,
    InvalidRequestError,
    ModelError,
    ModelNotFoundError,
)
from treadle.runtime.models.gguf_file import GGUFFile
from treadle.runtime.text.chat_template import ChatTemplate
from treadle.runtime.text.detokenizer import Detokenizer
from treadle.runtime.text.gguf_tokenizer import BYTE, CONTROL, UNKNOWN, USER_DEFINED, build_gguf_tokenizer
from treadle.runtime.text.huggingface_tokenizer import read_huggingface_folder
from treadle.runtime.text.special_text import END_OF_TURN_TOKENS, SpecialText, SpecialToken

IN_NO_WORD = "\ue000"
"""A character of private use: no vocabulary has a token that joins it to others."""


class Tokenizer:
    """A model's vocabulary: text to token ids and back, and which ids mean something other than text.

    `vocab_size` is one more than the largest id. `eos_token_ids` are all ids that end a turn, the model's declared one
    first. `special_ids` leave no text when decoded. `add_bos` tells whether the model was trained with the BOS token
    before every prompt; `encode` never adds it, since a chat template writes its own. `special_text` finds special
    tokens in text.

    Safe to share among threads: nothing changes after construction.
    """

    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    special_ids: frozenset[int]
    chat_template: ChatTemplate | None
    add_bos: bool
    special_text: SpecialText

    def __init__(
        self,
        backend: Backend,
        pieces: Sequence[bytes],
        *,
        special_tokens: Mapping[int, str],
        bos_token_id: int | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_template: ChatTemplate | None = None,
        add_bos: bool = False,
        strip_space: bool = False,
    ) -> None:
        self.vocab_size = len(pieces)
        self.bos_token_id = bos_token_id
        self.special_ids = frozenset(special_tokens)
        self.chat_template = chat_template
        self.add_bos = add_bos
        well_known = [token_id for token_id, text in special_tokens.items() if text in END_OF_TURN_TOKENS]
        declared = [token_id for token_id in eos_token_ids if 0 <= token_id < len(pieces)]
        self.eos_token_ids = tuple(dict.fromkeys([*declared, *sorted(well_known)]))
        self._pieces = pieces
        self._special_tokens = special_tokens
        self._strip_space = strip_space
        self._backend = backend
        self._literal_backend = _literal_twin(backend)
        self.special_text = _special_text(backend, special_tokens)

    def encode(self, text: str, *, special: bool = False, continues: bool = False) -> list[int]:
        """The ids of `text`. Adds neither BOS nor EOS.

        With `continues`, the text goes on from other text, so that no space is put before it: a SentencePiece model
        does that to any text's first word, and decoding takes it away at the very beginning only.

        With `special`, special tokens written out in the text become their ids. Without, as for anything that a user
        wrote, text that looks like a special token stays text, and no id in the result is in `special_ids`. Characters
        for which the vocabulary has no token at all (in some, a few control characters) are dropped, as the reference
        implementations do. Raises `InvalidRequestError` for lone surrogates, which are no text.
        """
        if continues and self._strip_space:
            num_before = len(self.encode(IN_NO_WORD))
            return self.encode(IN_NO_WORD + text, special=special)[num_before:]
        try:
            if special:
                return self._backend.encode(text, add_special_tokens=False).ids
            ids: list[int] = self._literal_backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            _check_text(text)
            raise
        return ids if self.special_ids.isdisjoint(ids) else self._without_special(ids)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids that are not in the vocabulary, nothing."""
        detokenizer = self.detokenizer(skip_special=skip_special)
        return detokenizer.push(ids) + detokenizer.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token, which may be part of a character. Empty if it is not in the vocabulary."""
        return self._pieces[token_id] if 0 <= token_id < self.vocab_size else b""

    def detokenizer(self, *, skip_special: bool = True) -> Detokenizer:
        """A decoder for one sequence whose ids come a few at a time."""
        skipped = self.special_ids if skip_special else frozenset[int]()
        return Detokenizer(self._pieces, skipped=skipped, strip_space=self._strip_space)

    def _without_special(self, ids: Iterable[int]) -> list[int]:
        """Spells out special ids that merges made of ordinary text, one character at a time."""
        spelled: list[int] = []
        for token_id in ids:
            if token_id not in self.special_ids:
                spelled.append(token_id)
                continue
            for char in self._special_tokens[token_id]:
                char_ids = self._literal_backend.encode(char, add_special_tokens=False).ids
                spelled += [char_id for char_id in char_ids if char_id not in self.special_ids]
        return spelled


def load_tokenizer(path: Path) -> Tokenizer:
    """Loads the tokenizer of a `.gguf` file or of a folder that holds `tokenizer.json`.

    Raises `ModelNotFoundError` if there is none at `path`, `CorruptModelError` if it is damaged, and
    `UnsupportedModelError` if it is of a kind that Treadle does not know.
    """
    try:
        if path.is_dir():
            return _from_folder(path)
        if path.suffix.lower() == ".gguf" or path.is_file():
            return tokenizer_from_gguf(GGUFFile(path).metadata)
    except ModelError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
    raise ModelNotFoundError(f"{path}: there is no such file or folder. Check the path.")


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that the metadata of a GGUF file describes. Raises as `load_tokenizer` does."""
    vocabulary = build_gguf_tokenizer(metadata)
    tokens, token_types = vocabulary.tokens, vocabulary.token_types
    verbatim = {i for i, token_type in enumerate(token_types) if token_type in (CONTROL, UNKNOWN, USER_DEFINED)}
    special = {i: tokens[i] for i in sorted(verbatim) if token_types[i] != USER_DEFINED}
    byte_tokens = None if vocabulary.byte_level else {i for i, kind in enumerate(token_types) if kind == BYTE}

    def token_id(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and 0 <= value < len(tokens) else None

    bos = token_id("bos")
    eos = [found for name in ("eos", "eot", "eom") if (found := token_id(name)) is not None]
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        vocabulary.backend,
        token_pieces(tokens, verbatim=verbatim, byte_tokens=byte_tokens),
        special_tokens=special,
        bos_token_id=bos,
        eos_token_ids=eos,
        chat_template=_chat_template(template, tokens, bos, eos),
        add_bos=vocabulary.add_bos,
        strip_space=vocabulary.space_prefix,
    )


def _from_folder(path: Path) -> Tokenizer:
    folder = read_huggingface_folder(path)
    return Tokenizer(
        folder.backend,
        token_pieces(folder.tokens, verbatim=folder.verbatim, byte_tokens=folder.byte_tokens),
        special_tokens=folder.special_tokens,
        bos_token_id=folder.bos_token_id,
        eos_token_ids=folder.eos_token_ids,
        chat_template=_chat_template(folder.chat_template, folder.tokens, folder.bos_token_id, folder.eos_token_ids),
        add_bos=folder.add_bos,
        strip_space=folder.strip_space,
    )


def _chat_template(source: object, tokens: Sequence[str], bos: int | None, eos: Sequence[int]) -> ChatTemplate | None:
    if not isinstance(source, str) or not source:
        return None
    return ChatTemplate(
        source,
        bos_token=tokens[bos] if bos is not None else "",
        eos_token=tokens[eos[0]] if eos else "",
    )


def token_pieces(tokens: Sequence[str], *, verbatim: set[int], byte_tokens: set[int] | None) -> list[bytes]:
    """The bytes of every token. `verbatim` tokens are their own text. Others are written in GPT-2's byte alphabet if
    `byte_tokens` is None; otherwise with `▁` for a space, and those in `byte_tokens` as `<0x0A>`.

    Raises `CorruptModelError` for a byte token that names no byte.
    """
    if byte_tokens is not None:
        return [
            token.encode()
            if i in verbatim
            else _byte_of(token)
            if i in byte_tokens
            else token.replace("▁", " ").encode()
            for i, token in enumerate(tokens)
        ]
    # GPT-2 gives each byte a printable letter; latin-1 turns the letters that stand for themselves into bytes at once.
    to_byte = str.maketrans(_byte_alphabet())
    pieces = []
    for i, token in enumerate(tokens):
        try:
            pieces.append(token.encode() if i in verbatim else token.translate(to_byte).encode("latin-1"))
        except UnicodeEncodeError:
            pieces.append(token.encode())
    return pieces


def _byte_alphabet() -> dict[str, str]:
    """GPT-2's letter for each byte, to the character that has this byte as its code point."""
    letters = set(ByteLevel.alphabet())
    plain = {chr(byte) for byte in range(256) if chr(byte) in letters}
    rest = [chr(byte) for byte in range(256) if chr(byte) not in plain]
    return {chr(256 + i): char for i, char in enumerate(rest)}


def _byte_of(token: str) -> bytes:
    match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    if match is None:
        raise CorruptModelError(f"the vocabulary has a byte token {token!r} that names no byte. Download it again.")
    return bytes.fromhex(match[1])


def _literal_twin(backend: Backend) -> Backend:
    """A second tokenizer that reads special tokens as plain text, on the same vocabulary, not a copy of it.

    A switch on one tokenizer would be shared among threads.
    """
    twin = Backend(backend.model)
    # The stubs do not say that these may be None.
    if backend.normalizer is not None:
        twin.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        twin.pre_tokenizer = backend.pre_tokenizer
    added = backend.get_added_tokens_decoder()
    for token_id in sorted(added):
        token = added[token_id]
        (twin.add_special_tokens if token.special else twin.add_tokens)([token])
    if twin.get_added_tokens_decoder().keys() != added.keys():
        twin = Backend.from_str(backend.to_str())
    twin.encode_special_tokens = True
    return twin


def _special_text(backend: Backend, special_tokens: Mapping[int, str]) -> SpecialText:
    added = backend.get_added_tokens_decoder()
    found = []
    for token_id, text in special_tokens.items():
        token = added.get(token_id)
        if token is not None:
            found.append(SpecialToken(token_id, text, strips_left=token.lstrip, strips_right=token.rstrip))
    return SpecialText(found)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start}), which is no "
            "character. Send text that is valid Unicode."
        ) from None
