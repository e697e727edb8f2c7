"""What clients send: the parts that requests have in common, checked strictly, so that every mistake has a name."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from treadle.grammar import JSONSchema, ToolSpec
from treadle.runtime.server.context import Server
from treadle.runtime.server.errors import api_error_of_body, invalid
from treadle.scheduler import SamplingParams

MAX_TOOLS = 256
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 4_096
MAX_PARTS = 4_096
"""Of the content of one message."""
MAX_CALLS = 1_024
"""Of tools, in one message."""


class RequestModel(BaseModel):
    """A part of a request. What is not known is ignored; what is known must have the right type: true is no number."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


M = TypeVar("M", bound=RequestModel)
V = TypeVar("V")
Many: TypeAlias = Annotated[list[V], Field(fail_fast=True)]
"""A list whose first wrong item is told, and of which no other is looked at then: a body may hold a million."""


def validated(body: Any, model: type[M]) -> M:
    """The body as its model. Raises the error that names the field at fault."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise api_error_of_body(error, body) from None
    except RecursionError:
        raise invalid("the request is nested too deeply", None) from None


def refused(fix: str, *, unless: tuple[Any, ...] = ()) -> AfterValidator:
    """Refuses a field that is known and says something: not null, false, an empty text or list, nor one of `unless`."""

    def check(value: Any) -> None:
        if value not in (None, False, "", [], *unless):
            raise ValueError(f"not supported: {fix}")

    return AfterValidator(check)


Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Bias: TypeAlias = Annotated[float, Field(ge=-100, le=100)]
Label: TypeAlias = Annotated[str, Field(max_length=1024)]
Metadata: TypeAlias = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(fail_fast=True, max_length=16),
]
CacheRetention: TypeAlias = Literal["in_memory", "in-memory", "24h"]
ServiceTier: TypeAlias = Literal["auto", "default", "flex", "scale", "priority", "fast", "standard_only"]


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
    logit_bias: Annotated[dict[str, Bias], Field(fail_fast=True, max_length=MAX_BIASES)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[Many[Stop], Field(max_length=MAX_STOPS)] | None = None


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


def check_known(names: Iterable[str], tools: Collection[str], param: str) -> None:
    """Raises `ApiError` 400 for a name that is none of a tool. `param` is where the request has it."""
    for name in names:
        if name not in tools:
            raise invalid(f"{param}: there is no tool {name[:140]!r} in tools", param)


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
