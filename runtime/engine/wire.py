"""Commands and events as bytes: what an engine's process and its owner say to each other.

A message is a batch: `[[kind, field, field, ...], ...]` in msgpack, the fields in the order in which their class has
them. On a stream, each message is preceded by its length in 4 bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import attrgetter, or_
from typing import Any, TypeAlias, get_args, get_type_hints

import msgspec
from msgspec.structs import astuple

from treadle.scheduler import Command, Event

LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class Load:
    """The first word of the owner: which model, and the fields of its `EngineConfig`."""

    model: str
    config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The first word of a process whose engine is ready: what that engine is.

    Attributes:
        max_context: Most tokens of a call, prompt and generation together.
        max_calls: Most live calls; more are refused.
        num_pages, num_host_pages: Pages of KV, on the device and in the second tier.
        page_size: Tokens in a page.
        page_bytes: What a page takes up.
        vocab_size: Token ids are below this.
        dtype, device: Of weights and KV.
    """

    max_context: int
    max_calls: int
    num_pages: int
    num_host_pages: int
    page_size: int
    page_bytes: int
    vocab_size: int
    dtype: str
    device: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The last word of a process that cannot go on: the class of the error, and what it says."""

    kind: str
    message: str


Message: TypeAlias = Command | Event | Load | EngineInfo | Failed


def encode(batch: Sequence[Message]) -> bytes:
    """The bytes of a batch. Raises `ValueError` for what cannot be written, such as half a surrogate pair."""
    try:
        return _ENCODER.encode([_STRUCTS[type(message)](*_FIELDS[type(message)](message)) for message in batch])
    except (OverflowError, TypeError) as error:
        raise ValueError(str(error)) from error


def decode(data: bytes) -> tuple[Message, ...]:
    """The batch that bytes stand for; equal to what was encoded. Raises `msgspec.DecodeError` for anything else."""
    return tuple(_CLASSES[type(part)](*astuple(part)) for part in _DECODER.decode(data))


def framed(batch: Sequence[Message]) -> bytes:
    """A batch as it stands on a stream."""
    data = encode(batch)
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


def _struct_of(kind: type, tag: int) -> type[msgspec.Struct]:
    """A struct with the fields of a dataclass, which msgspec can tell from others by its tag."""
    hints = get_type_hints(kind)
    exact = {Sequence[int]: tuple[int, ...]}
    typed = [(field.name, exact.get(hints[field.name], hints[field.name])) for field in fields(kind)]
    return msgspec.defstruct(kind.__name__, typed, tag=tag, array_like=True)


def _fields_of(kind: type) -> Callable[[Message], tuple[Any, ...]]:
    names = [field.name for field in fields(kind)]
    get = attrgetter(*names)
    return get if len(names) > 1 else lambda message: (get(message),)


def _as_list(value: object) -> list[int]:
    if isinstance(value, array):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be written")


_KINDS: tuple[type, ...] = get_args(Message)
_STRUCTS = {kind: _struct_of(kind, tag) for tag, kind in enumerate(_KINDS)}
_CLASSES = {struct: kind for kind, struct in _STRUCTS.items()}
_FIELDS = {kind: _fields_of(kind) for kind in _KINDS}
_ENCODER = msgspec.msgpack.Encoder(enc_hook=_as_list)
_DECODER: msgspec.msgpack.Decoder[list[Any]] = msgspec.msgpack.Decoder(list[reduce(or_, _CLASSES)])  # type: ignore[misc]
