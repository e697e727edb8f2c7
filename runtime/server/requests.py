"""What clients send: the parts that requests have in common, checked strictly, so that every mistake has a name."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from treadle.grammar import JSONSchema, ToolSpec
from treadle.runtime.server.context import SERVER, Server
from treadle.runtime.server.errors import api_error_of_body, invalid
from treadle.runtime.server.limits import read_json
from treadle.scheduler import SamplingParams

MAX_TOOLS = 256
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_TOP_LOGPROBS = 20


class RequestModel(BaseModel):
    """A part of a request. What is not known is ignored; what is known must have the right type: true is no number."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


M = TypeVar("M", bound=RequestModel)
V = TypeVar("V")


def validated(body: Any, model: type[M]) -> M:
    """The body as its model. Raises the error that names the field at fault."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise api_error_of_body(error, body) from None
    except RecursionError:
        raise invalid("the request is nested too deeply", None) from None


async def parse_body(request: web.Request, model: type[M]) -> M:
    """The request's JSON as its model. Raises `ApiError` 400 with the name of the field at fault."""
    return validated(await read_json(request, request.app[SERVER].config), model)


Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class StreamOptions(RequestModel):
    """How an answer is streamed. `include_obfuscation` asks for padding, of which there is none."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(RequestModel):
    """How tokens are chosen: what OpenAI's endpoints have in common, and what many other servers know besides."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None


def sampling_params(
    fields: SamplingFields, *, vocab_size: int, stop_token_ids: Sequence[int], logprobs: int | None = None
) -> SamplingParams:
    """What the fields ask for. What is not given is as OpenAI has it, and the seed by chance."""
    stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
    return SamplingParams(
        temperature=_or(fields.temperature, 1.0),
        top_k=max(0, _or(fields.top_k, 0)),
        top_p=_or(fields.top_p, 1.0),
        min_p=_or(fields.min_p, 0.0),
        repetition_penalty=_or(fields.repetition_penalty, 1.0),
        presence_penalty=_or(fields.presence_penalty, 0.0),
        frequency_penalty=_or(fields.frequency_penalty, 0.0),
        logit_bias=logit_bias(fields.logit_bias or {}, vocab_size),
        seed=secrets.randbits(62) if fields.seed is None else fields.seed,
        stop=stop,
        stop_token_ids=tuple(stop_token_ids),
        logprobs=logprobs,
    )


def logit_bias(given: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Pairs of token id and bias. Raises `ApiError` for what is no token of the model."""
    for key in given:
        if not re.fullmatch(r"[0-9]{1,9}", key) or int(key) >= vocab_size:
            last = vocab_size - 1
            raise invalid(f"logit_bias: {key[:40]!r} is no token id; they lie in 0 .. {last}", "logit_bias")
    return tuple((int(key), value) for key, value in given.items())


def tool_spec(name: str, description: str | None, parameters: Mapping[str, Any] | None, param: str) -> ToolSpec:
    """A tool as grammars know it. `param` is where the request has it."""
    if not re.fullmatch(r"[a-zA-Z0-9_.-]{1,128}", name):
        rule = "1 to 128 letters, digits, underscores, dots and hyphens"
        raise invalid(f"{param}.name: {name[:140]!r} is no name for a tool; give {rule}", f"{param}.name")
    schema = {"type": "object", "properties": {}} if not parameters else dict(parameters)
    return ToolSpec(name, description or "", json.dumps(schema, ensure_ascii=False))


def json_answer(schema: Mapping[str, Any], *, strict: bool) -> JSONSchema:
    """An answer that satisfies a schema. What it says is checked when it is compiled."""
    return JSONSchema(json.dumps(schema, ensure_ascii=False), strict=strict)


ANY_OBJECT = JSONSchema('{"type": "object"}')
"""What `json_object` means."""


def _or(value: V | None, default: V) -> V:
    return default if value is None else value


def checked_n(n: int | None, server: Server) -> int:
    """How many answers. Raises `ApiError` 400 for more than this server gives."""
    most = min(server.config.max_choices, server.engine.max_calls)
    if n is not None and n > most:
        raise invalid(f"n: this server gives at most {most} answers to a request", "n")
    return 1 if n is None else n


def checked_max_tokens(max_tokens: int | None, server: Server, param: str = "max_tokens") -> int | None:
    """Most tokens to generate. Raises `ApiError` 400 for more than the context holds; less is cut to what is free."""
    if max_tokens is not None and max_tokens > server.engine.max_context:
        text = f"{param}: the context holds {server.engine.max_context} tokens, prompt and answer together"
        raise invalid(text, param)
    return max_tokens
