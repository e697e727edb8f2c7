"""What a request may look like before anybody works on it: its size, its JSON, how much text it brings."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from aiohttp import web

from treadle.grammar import ToolSpec
from treadle.runtime.server.config import ServerConfig
from treadle.runtime.server.errors import ApiError, invalid

T = TypeVar("T")
LARGE_BYTES = 256 << 10
"""Larger bodies are worked on beside the event loop, which must not stand still for so long."""
MAX_KEYS = 16_384
"""Of one object. Nobody means more, and each may be wrong in its own way."""
LARGEST_INTEGER = 2**63 - 1
# A string, unfinished or not, or a bracket outside of one. Possessive, so that no text makes it go back.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?+|[\[\]{}]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


async def read_json(request: web.Request, config: ServerConfig) -> dict[str, Any]:
    """The JSON object in a request's body. Raises `ApiError` for a body that is late, too large or no such object."""
    return await read_as(request, config, lambda body: body)


async def read_as(request: web.Request, config: ServerConfig, make: Callable[[dict[str, Any]], T]) -> T:
    """What `make` makes of the JSON object in a request's body, in another thread if it is large.

    Raises `ApiError` as `read_json` does, and what `make` raises.
    """
    content = await read_body(request, config)

    def made() -> T:
        value = parse_json(content, config.max_json_depth)
        if not isinstance(value, dict):
            raise invalid("the body must be a JSON object", None)
        return make(value)

    return await asyncio.to_thread(made) if len(content) > LARGE_BYTES else made()


async def read_body(request: web.Request, config: ServerConfig) -> bytes:
    """A request's body. What goes beyond the limits is not read: the connection is closed after the answer."""
    encoding = request.headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity":
        raise ApiError(415, f"the body is encoded as {encoding!r}; send it as it is", code="unsupported_encoding")
    too_large = ApiError(413, f"the body has more than {config.max_body_bytes} bytes", code="body_too_large")
    if (request.content_length or 0) > config.max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > config.max_body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body was not there after {config.body_timeout_s:g} s", code="body_timeout") from None
    return bytes(body)


def parse_json(body: bytes, max_depth: int) -> Any:
    """The value that a body spells in JSON, read strictly (RFC 8259, and I-JSON, RFC 7493).

    Raises `ApiError` 400 for anything else, and for what readers of JSON disagree about: keys that come twice, NaN and
    Infinity, integers beyond 64 bits, numbers beyond a double, halves of surrogate pairs; and for an object of more
    than `MAX_KEYS` keys.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise invalid("the body is not UTF-8", None, "invalid_json") from None
    _check_depth(text, max_depth)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError as error:
        message = f"the body is not JSON: {error.msg} at character {error.pos}"
        raise invalid(message, None, "invalid_json") from None
    if _SURROGATE_ESCAPE.search(text):
        _check_text(value)
    return value


def _check_depth(text: str, max_depth: int) -> None:
    """Looks at the text, so that no deep value is ever built."""
    if text.count("[") + text.count("{") <= max_depth:
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        if match[0] in "[{":
            depth += 1
            if depth > max_depth:
                raise invalid(f"the JSON is more than {max_depth} levels deep", None, "json_too_deep")
        elif match[0] in "]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise invalid(f"an object has more than {MAX_KEYS} keys", None, "too_many_keys")
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise invalid(f"the key {twice[:64]!r} is there twice", twice[:64], "duplicate_key")
    return value


def _integer(digits: str) -> int:
    if len(digits) > 20 or abs(value := int(digits)) > LARGEST_INTEGER:
        raise invalid(f"{digits[:24]}... is not an integer of 64 bits", None, "number_too_large")
    return value


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise invalid(f"{digits[:24]} is larger than a number may be", None, "number_too_large")
    return value


def _refuse_constant(word: str) -> NoReturn:
    raise invalid(f"{word} is not a number of JSON", None, "not_finite")


def _check_text(value: Any) -> None:
    for text in _texts(value):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise invalid("a text has half of a surrogate pair", None, "invalid_text") from None


def _texts(value: Any) -> Iterator[str]:
    """All strings of a JSON value, keys too. Its depth was checked."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)


def check_count(messages: Sequence[Any], config: ServerConfig, param: str = "messages") -> None:
    """Raises `ApiError` 400 for a conversation of too many messages."""
    if len(messages) > config.max_messages:
        text = f"{len(messages)} messages are more than the {config.max_messages} that this server takes"
        raise invalid(text, param, "too_many_messages")


def check_conversation(
    messages: Sequence[Any], config: ServerConfig, param: str = "messages", tools: Iterable[ToolSpec] = ()
) -> int:
    """How many characters a conversation has, with the tools that the model is told of.

    Raises `ApiError` 400 for too many messages, or too many characters, before they are made into tokens.
    """
    check_count(messages, config, param)
    told = [[tool.name, tool.description, tool.parameters] for tool in tools]
    return check_characters([*messages, told], config, param)


def check_characters(value: Any, config: ServerConfig, param: str) -> int:
    """How many characters the strings of a JSON value have. Raises `ApiError` 400 for more than a prompt may have."""
    left = config.max_prompt_characters
    for text in _texts(value):
        left -= len(text)
        if left < 0:
            message = f"the prompt has more than the {config.max_prompt_characters} characters that this server takes"
            raise invalid(message, param, "prompt_too_long")
    return config.max_prompt_characters - left
