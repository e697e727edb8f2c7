"""What a server says of itself: its models, its version, whether it is well; and text as token ids."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import Field
from typing_extensions import TypedDict

from treadle.runtime.server.answers import json_answer
from treadle.runtime.server.chat_requests import FunctionTool, Message, message_of, specs_of
from treadle.runtime.server.context import SERVER, TENANT, Server
from treadle.runtime.server.errors import ApiError, invalid
from treadle.runtime.server.limits import check_characters, check_conversation, read_as
from treadle.runtime.server.prompts import encode_beside
from treadle.runtime.server.requests import MAX_TOOLS, Many, RequestModel, validated
from treadle.runtime.server.routes import Route


class Model(TypedDict):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    """All models that are served."""

    object: Literal["list"]
    data: list[Model]


class State(TypedDict):
    """How the server is."""

    status: Literal["ok", "draining", "engine_unavailable"]


class Version(TypedDict):
    """Which Treadle this is."""

    version: str


class TokenizeRequest(RequestModel):
    """Text, or a conversation."""

    prompt: str | None = None
    messages: Annotated[Many[Message], Field(min_length=1)] | None = None
    tools: Annotated[Many[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    model: str | None = None


class Tokens(TypedDict):
    """Token ids, how many they are, and how many a call can have."""

    tokens: list[int]
    count: int
    max_model_len: int


class EmbeddingsRequest(RequestModel):
    """What an embedding is asked for."""

    model: str
    input: Any = None


async def list_models(request: web.Request) -> web.StreamResponse:
    """The model, and its other names."""
    server = request.app[SERVER]
    return json_answer({"object": "list", "data": [_model(name, server.created_at) for name in server.models]})


async def get_model(request: web.Request) -> web.StreamResponse:
    """One model."""
    server, name = request.app[SERVER], request.match_info["model"]
    server.check_model(name)
    return json_answer(_model(name, server.created_at))


def _model(name: str, created: int) -> Model:
    return {"id": name, "object": "model", "created": created, "owned_by": "treadle"}


async def live(request: web.Request) -> web.StreamResponse:
    """Whether the server answers at all."""
    return _state("ok")


async def ready(request: web.Request) -> web.StreamResponse:
    """Whether the server takes requests now."""
    server = request.app[SERVER]
    return _state("draining" if server.draining else "ok" if server.is_engine_there() else "engine_unavailable")


async def health(request: web.Request) -> web.StreamResponse:
    """Whether the engine is there, whatever the server is about."""
    return _state("ok" if request.app[SERVER].is_engine_there() else "engine_unavailable")


def _state(status: Literal["ok", "draining", "engine_unavailable"]) -> web.Response:
    state: State = {"status": status}
    return json_answer(state, 200 if status == "ok" else 503)


async def get_version(request: web.Request) -> web.StreamResponse:
    """Which Treadle this is."""
    return json_answer({"version": version("treadle")})


async def tokenize(request: web.Request) -> web.StreamResponse:
    """The token ids of a text, or of a conversation as the model would be asked to go on with it."""
    server = request.app[SERVER]
    with server.admission.admit(request[TENANT]):
        encode, num_characters = await read_as(request, server.config, partial(_encoding, server))
        token_ids = await encode_beside(encode, num_characters)
    tokens: Tokens = {
        "tokens": list(token_ids),
        "count": len(token_ids),
        "max_model_len": server.engine.max_context,
    }
    return json_answer(tokens)


def _encoding(server: Server, body: dict[str, Any]) -> tuple[Callable[[], tuple[int, ...]], int]:
    """What makes the tokens that a body asks for, and of how many characters."""
    given = validated(body, TokenizeRequest)
    if given.model is not None:
        server.check_model(given.model)
    encoder = server.text_model()[1]
    if (given.prompt is None) == (given.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    if given.prompt is not None:
        num_characters = check_characters(given.prompt, server.config, "prompt")
        return partial(encoder.encode_text, given.prompt), num_characters
    messages = [message_of(message) for message in given.messages or ()]
    tools = specs_of(given.tools or ())
    num_characters = check_conversation(messages, server.config, tools=tools)
    return partial(encoder.encode, messages, tools), num_characters


async def embeddings(request: web.Request) -> web.StreamResponse:
    """Says that there are none."""
    raise ApiError(400, "this server generates text; it makes no embeddings", code="unsupported_endpoint")


ROUTES = (
    Route("GET", "/v1/models", list_models, "List the models", answer=ModelList),
    Route("GET", "/v1/models/{model:.+}", get_model, "Describe a model", answer=Model, errors=(404,)),
    Route("POST", "/v1/embeddings", embeddings, "Not supported", body=EmbeddingsRequest),
    Route(
        "POST",
        "/tokenize",
        tokenize,
        "Turn text into token ids",
        body=TokenizeRequest,
        answer=Tokens,
        errors=(404, 429),
    ),
    Route("GET", "/livez", live, "Tell whether the server answers", answer=State, is_public=True),
    Route("GET", "/readyz", ready, "Tell whether it takes requests", answer=State, errors=(503,), is_public=True),
    Route("GET", "/health", health, "Tell whether the engine is there", answer=State, errors=(503,), is_public=True),
    Route("GET", "/version", get_version, "Tell which Treadle this is", answer=Version, is_public=True),
)
