"""The body of `POST /v1/responses`. What cannot be honoured is refused by its name; unknown fields are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from treadle.runtime.server.requests import (
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
    refused,
)
from treadle.runtime.server.responses.inputs import Input

LOGPROBS = "message.output_text.logprobs"
MAX_INCLUDED = 64

Includable: TypeAlias = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""What may be included. All but logprobs belong to items that this server never writes, and add nothing."""


class FunctionDeclaration(RequestModel):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(RequestModel):
    """A tool by its name."""

    type: Literal["function"]
    name: str


class FunctionSubset(RequestModel):
    """Some of the tools: the others stay in the prompt, where the cache finds them, and may not be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[Many[FunctionChoice], Field(min_length=1, max_length=MAX_TOOLS)]


def _choice_form(value: Any) -> str | None:
    if isinstance(value, str):
        return "<mode>"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>"


ToolChoice: TypeAlias = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[FunctionChoice, Tag("<function>")]
    | Annotated[FunctionSubset, Tag("<allowed_tools>")],
    Discriminator(
        _choice_form,
        custom_error_type="unsupported_tool_choice",
        custom_error_message="use none, auto, required, a function or allowed_tools",
    ),
]


class PlainTextFormat(RequestModel):
    """Free text."""

    type: Literal["text"] = "text"


class AnyObjectFormat(RequestModel):
    """Any JSON object."""

    type: Literal["json_object"]


class TextSchemaFormat(RequestModel):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class TextOptions(RequestModel):
    """How the answer is written."""

    format: Annotated[PlainTextFormat | AnyObjectFormat | TextSchemaFormat, Discriminator("type")] = PlainTextFormat()
    verbosity: Annotated[Literal["low", "medium", "high"] | None, refused("this model has one verbosity")] = None


class ReasoningOptions(RequestModel):
    """How much is thought before the answer: nothing. There is no reasoning to summarise either."""

    effort: Annotated[str | None, refused("this model does not reason apart; give none", unless=("none",))] = None
    summary: str | None = None


class ResponseRequest(SamplingFields):
    """A turn to be written, after the items of `input` and perhaps those of an earlier response."""

    model: str
    input: Input = ""
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[Many[FunctionDeclaration], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int | None, Field(ge=1)] = None
    text: TextOptions | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    include: Annotated[Many[Includable], Field(max_length=MAX_INCLUDED)] | None = None
    metadata: Metadata | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: CacheRetention | None = None
    prompt_cache_options: dict[str, Any] | None = None
    safety_identifier: Label | None = None
    user: Label | None = None
    service_tier: ServiceTier | None = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None,
        refused("nothing is dropped from a conversation; shorten it yourself", unless=("disabled",)),
    ] = None
    reasoning: ReasoningOptions | None = None
    background: Annotated[bool | None, refused("ask for a stream, or wait for the answer")] = None
    conversation: Annotated[Any, refused("go on from previous_response_id")] = None
    prompt: Annotated[Any, refused("there are no stored prompts; send instructions and input")] = None
    context_management: Annotated[Any, refused("send what is to be kept as input")] = None
    moderation: Annotated[Any, refused("this server does not moderate")] = None
