"""What a server says of itself: its models, its version, whether it is well; and text as token ids."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import Field
from typing_extensions import TypedDict

from treadle.runtime.server.answers import json_answer
from treadle.runtime.server.chat_requests import FunctionTool, Message, message_of, specs_of
from treadle.runtime.server.context import SERVER
from treadle.runtime.server.errors import ApiError, invalid
from treadle.runtime.server.limits import check_characters, check_conversation
from treadle.runtime.server.requests import MAX_TOOLS, RequestModel, parse_body
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
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
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
    given = await parse_body(request, TokenizeRequest)
    if given.model is not None:
        server.check_model(given.model)
    encoder = server.text_model()[1]
    if (given.prompt is None) == (given.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    if given.prompt is not None:
        check_characters(given.prompt, server.config, "prompt")
        token_ids = encoder.encode_text(given.prompt)
    else:
        messages = [message_of(message) for message in given.messages or ()]
        check_conversation(messages, server.config)
        token_ids = encoder.encode(messages, specs_of(given.tools or ()))
    tokens: Tokens = {
        "tokens": list(token_ids),
        "count": len(token_ids),
        "max_model_len": server.engine.max_context,
    }
    return json_answer(tokens)


async def embeddings(request: web.Request) -> web.StreamResponse:
    """Says that there are none."""
    raise ApiError(400, "this server generates text; it makes no embeddings", code="unsupported_endpoint")


ROUTES = (
    Route("GET", "/v1/models", list_models, "List the models", answer=ModelList),
    Route("GET", "/v1/models/{model:.+}", get_model, "Describe a model", answer=Model, errors=(404,)),
    Route("POST", "/v1/embeddings", embeddings, "Not supported", body=EmbeddingsRequest),
    Route(
        "POST", "/tokenize", tokenize, "Turn text into token ids", body=TokenizeRequest, answer=Tokens, errors=(404,)
    ),
    Route("GET", "/livez", live, "Tell whether the server answers", answer=State, is_public=True),
    Route("GET", "/readyz", ready, "Tell whether it takes requests", answer=State, errors=(503,), is_public=True),
    Route("GET", "/health", health, "Tell whether the engine is there", answer=State, errors=(503,), is_public=True),
    Route("GET", "/version", get_version, "Tell which Treadle this is", answer=Version, is_public=True),
)
