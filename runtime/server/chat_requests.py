"""The body of `POST /v1/chat/completions`. What cannot be honoured is refused by name; unknown fields are ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Discriminator, Field, Tag

from treadle.grammar import JSONSchema, ToolSpec
from treadle.runtime.server.errors import invalid
from treadle.runtime.server.requests import (
    ANY_OBJECT,
    MAX_CALLS,
    MAX_PARTS,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
    CacheRetention,
    Label,
    Many,
    Metadata,
    RequestModel,
    SamplingFields,
    ServiceTier,
    StreamOptions,
    check_known,
    json_answer,
    refused,
    tool_spec,
)


class TextPart(RequestModel):
    """Text in the content of a message."""

    type: Literal["text"]
    text: str


class RefusalPart(RequestModel):
    """What an assistant said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


def _no_such_content(kind: str) -> str:
    raise ValueError(f"this model reads text only, no {kind}")


class OtherPart(RequestModel):
    """Content that is no text: always refused."""

    type: Annotated[Literal["image_url", "input_audio", "file"], AfterValidator(_no_such_content)]


Part: TypeAlias = Annotated[TextPart | RefusalPart | OtherPart, Discriminator("type")]
Content: TypeAlias = str | Annotated[Many[Part], Field(max_length=MAX_PARTS)]


class CalledFunction(RequestModel):
    """Name and arguments of a call. Arguments are JSON text, as the model wrote it."""

    name: str
    arguments: str


class CalledTool(RequestModel):
    """A call that an assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class SystemMessage(RequestModel):
    """Instructions. `developer` is a newer word for `system`."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(RequestModel):
    """What a user says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(RequestModel):
    """What the model said before."""

    role: Literal["assistant"]
    content: Content | None = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: Annotated[Many[CalledTool], Field(max_length=MAX_CALLS)] | None = None
    audio: Annotated[Any, refused("this model writes text only")] = None
    function_call: Annotated[Any, refused("use tool_calls")] = None


class ToolMessage(RequestModel):
    """What a tool returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str


def _role(message: Any) -> str:
    role = message.get("role") if isinstance(message, dict) else None
    return "system" if role == "developer" else str(role)


Message: TypeAlias = Annotated[
    Annotated[SystemMessage, Tag("system")]
    | Annotated[UserMessage, Tag("user")]
    | Annotated[AssistantMessage, Tag("assistant")]
    | Annotated[ToolMessage, Tag("tool")],
    Discriminator(
        _role,
        custom_error_type="role",
        custom_error_message="role must be one of system, developer, user, assistant and tool",
    ),
]


class FunctionSchema(RequestModel):
    """A function: its name, what it is for, and a JSON Schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(RequestModel):
    """A tool of the client."""

    type: Literal["function"]
    function: FunctionSchema


class FunctionName(RequestModel):
    """A function by its name."""

    name: str


class NamedTool(RequestModel):
    """A tool by its name."""

    type: Literal["function"]
    function: FunctionName


class AllowedToolList(RequestModel):
    """Some of the tools: the others stay in the prompt, where the cache finds them, and may not be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[Many[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(RequestModel):
    """A choice among tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedToolList


class TextFormat(RequestModel):
    """Free text."""

    type: Literal["text"]


class ObjectFormat(RequestModel):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(RequestModel):
    """A JSON Schema. With `strict`, what cannot be guaranteed while generating is refused."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(RequestModel):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ToolChoice: TypeAlias = Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedTools, Discriminator("type")]
ResponseFormat: TypeAlias = Annotated[TextFormat | ObjectFormat | SchemaFormat, Discriminator("type")]


def _reasons_not(effort: str) -> str:
    if effort != "none":
        raise ValueError("this model does not reason before it answers; leave it out")
    return effort


def _text_only(modalities: list[str]) -> list[str]:
    if modalities != ["text"]:
        raise ValueError("this model writes text only; leave it out")
    return modalities


class ChatRequest(SamplingFields):
    """A conversation, and how the model is to go on with it."""

    model: str
    messages: Annotated[Many[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[Many[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None

    metadata: Metadata | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: CacheRetention | None = None
    prompt_cache_options: dict[str, Any] | None = None
    safety_identifier: Label | None = None
    user: Label | None = None
    service_tier: ServiceTier | None = None

    reasoning_effort: Annotated[str, AfterValidator(_reasons_not)] | None = None
    modalities: Annotated[Many[str], Field(max_length=8), AfterValidator(_text_only)] | None = None
    verbosity: Annotated[Literal["low", "medium", "high"], refused("tell the model in a message")] | None = None
    store: Annotated[bool, refused("chat completions are not stored; use /v1/responses")] | None = None
    audio: Annotated[Any, refused("this model writes text only")] = None
    prediction: Annotated[Any, refused("leave it out")] = None
    moderation: Annotated[Any, refused("leave it out")] = None
    web_search_options: Annotated[Any, refused("give the model a tool that searches")] = None
    functions: Annotated[Any, refused("use tools")] = None
    function_call: Annotated[Any, refused("use tool_choice")] = None


def specs_of(tools: Sequence[FunctionTool]) -> tuple[ToolSpec, ...]:
    """The tools that the model is told of. Raises `ApiError` 400 for a name that cannot be, or is there twice."""
    specs: dict[str, ToolSpec] = {}
    for index, tool in enumerate(tools):
        param, function = f"tools[{index}].function", tool.function
        if function.name in specs:
            raise invalid(f"{param}.name: there is another tool {function.name!r}", f"{param}.name")
        specs[function.name] = tool_spec(function.name, function.description, function.parameters, param)
    return tuple(specs.values())


def choice_of(
    request: ChatRequest, tools: tuple[ToolSpec, ...]
) -> tuple[Literal["auto", "none", "required"], tuple[str, ...] | None]:
    """Whether tools may be called, and which: None means all. Raises `ApiError` 400 for one that is not there."""
    choice = request.tool_choice
    if choice is not None and choice not in ("none", "auto") and not tools:
        raise invalid("tool_choice: there are no tools to choose from", "tool_choice")
    if choice is None or isinstance(choice, str):
        return choice or "auto", None
    allowed = choice.allowed_tools.tools if isinstance(choice, AllowedTools) else [choice]
    names = tuple(tool.function.name for tool in allowed)
    check_known(names, {tool.name for tool in tools}, "tool_choice")
    return choice.allowed_tools.mode if isinstance(choice, AllowedTools) else "required", names


def answer_of(request: ChatRequest) -> JSONSchema | None:
    """What the answer must be; None for free text."""
    match request.response_format:
        case ObjectFormat():
            return ANY_OBJECT
        case SchemaFormat(json_schema=given):
            return json_answer(given.schema_, strict=bool(given.strict))
    return None


def message_of(message: Message) -> dict[str, Any]:
    """A message as templates take it: with its content as text."""
    plain: dict[str, Any] = {"role": message.role, "content": _text(message.content)}
    if isinstance(message, ToolMessage):
        return {**plain, "tool_call_id": message.tool_call_id}
    if message.name:
        plain["name"] = message.name
    if isinstance(message, AssistantMessage):
        if message.tool_calls:
            plain["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        elif plain["content"] is None:
            plain["content"] = message.refusal or ""
    return plain


def _text(content: Content | None) -> str | None:
    if content is None or isinstance(content, str):
        return content
    return "".join(part.text if isinstance(part, TextPart) else getattr(part, "refusal", "") for part in content)
