"""Reads the tokenizer of a Hugging Face-style folder: `tokenizer.json` and the small files beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer as Backend

from treadle.runtime.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError


class HuggingFaceFolder(NamedTuple):
    """What a folder says about its tokenizer. `verbatim` are the ids of tokens that stand for their own text;
    `byte_tokens` those written as `<0x0A>`, or None if the vocabulary is in GPT-2's byte alphabet."""

    backend: Backend
    tokens: list[str]
    verbatim: set[int]
    byte_tokens: set[int] | None
    special_tokens: dict[int, str]
    bos_token_id: int | None
    eos_token_ids: list[int]
    chat_template: str | None
    add_bos: bool
    strip_space: bool


def read_huggingface_folder(path: Path) -> HuggingFaceFolder:
    """Reads `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`, `generation_config.json` and
    `config.json`; only the first must be there. Raises as `load_tokenizer` does."""
    backend, description = _backend(path / "tokenizer.json")
    settings = _json(path / "tokenizer_config.json")
    added = backend.get_added_tokens_decoder()
    tokens = _tokens(backend)
    byte_tokens, strip_space = _decoding(path, description, tokens)

    def token_id(name: str) -> int | None:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        return backend.token_to_id(text) if isinstance(text, str) else None

    bos = token_id("bos_token")
    eos = [] if (found := token_id("eos_token")) is None else [found]
    for name in ("generation_config.json", "config.json"):
        eos += _ids(_json(path / name).get("eos_token_id"))
    if bos is None:
        bos = next(iter(_ids(_json(path / "config.json").get("bos_token_id"))), None)
        bos = bos if bos is not None and bos < len(tokens) else None
    return HuggingFaceFolder(
        backend=backend,
        tokens=tokens,
        verbatim=set(added),
        byte_tokens=byte_tokens,
        special_tokens={i: added[i].content for i in sorted(added) if added[i].special},
        bos_token_id=bos,
        eos_token_ids=list(dict.fromkeys(eos)),
        chat_template=_chat_template(path, settings),
        add_bos=bos is not None and backend.encode("").ids[:1] == [bos],
        strip_space=strip_space,
    )


def _backend(path: Path) -> tuple[Backend, dict[str, Any]]:
    if not path.is_file():
        if (path.parent / "tokenizer.model").is_file():
            raise UnsupportedModelError(
                f"{path.parent} holds tokenizer.model but no tokenizer.json. Load it once with transformers' "
                "AutoTokenizer and save it with save_pretrained."
            )
        raise ModelNotFoundError(f"{path} is missing. Put the model's tokenizer.json beside its weights.")
    text = _text(path)
    description = _parse(path, text)
    try:
        backend = Backend.from_str(text)
    # The library raises a bare Exception for every fault in the file.
    except Exception as error:
        raise CorruptModelError(f"{path} is not a tokenizer ({error}). Download it again.") from error
    backend.no_truncation()
    backend.no_padding()
    return backend, description


def _tokens(backend: Backend) -> list[str]:
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = [""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        tokens[token_id] = token
    return tokens


def _decoding(path: Path, description: dict[str, Any], tokens: list[str]) -> tuple[set[int] | None, bool]:
    """How tokens are written, and whether the first space is not part of the text, from the decoder's steps."""
    steps = {step.get("type"): step for step in _steps(description.get("decoder"))}
    if "ByteLevel" in steps:
        return None, False
    if "Metaspace" in steps or "Replace" in steps:
        metaspace = steps.get("Metaspace")
        strips = "Strip" in steps if metaspace is None else metaspace.get("prepend_scheme", "always") != "never"
        bytes_written = {f"<0x{byte:02X}>" for byte in range(256)} if "ByteFallback" in steps else set()
        return {i for i, token in enumerate(tokens) if token in bytes_written}, strips
    kind = ", ".join(sorted(str(name) for name in steps)) or "none"
    raise UnsupportedModelError(
        f"{path}: tokenizer.json has the decoder {kind}; Treadle supports ByteLevel, Metaspace and the SentencePiece "
        "sequence of Replace, ByteFallback, Fuse and Strip. Use a model with one of these."
    )


def _steps(decoder: object) -> Iterator[dict[str, Any]]:
    if isinstance(decoder, dict):
        if decoder.get("type") == "Sequence":
            for step in decoder.get("decoders", []):
                yield from _steps(step)
        else:
            yield decoder


def _chat_template(path: Path, settings: dict[str, Any]) -> str | None:
    if (path / "chat_template.jinja").is_file():
        return _text(path / "chat_template.jinja")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, int) and not isinstance(entry, bool)]


def _json(path: Path) -> dict[str, Any]:
    return _parse(path, _text(path)) if path.is_file() else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptModelError(f"{path} cannot be read ({error}). Download it again.") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptModelError(f"{path} is not JSON ({error}). Download it again.") from error
    if not isinstance(parsed, dict):
        raise CorruptModelError(f"{path} is not a JSON object. Download it again.")
    return parsed
