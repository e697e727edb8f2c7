"""What may stand in `input`: the items of a conversation, and their parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Discriminator, Field, Tag

from treadle.runtime.server.requests import MAX_PARTS, Many, RequestModel


class InputText(RequestModel):
    """A piece of text, in what a user or a tool said, or a model before."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputRefusal(RequestModel):
    """What a model said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


def _content_form(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<list>"


Part: TypeAlias = Annotated[InputText | InputRefusal, Discriminator("type")]
Content: TypeAlias = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Many[Part], Field(max_length=MAX_PARTS), Tag("<list>")],
    Discriminator(_content_form),
]


class MessageInput(RequestModel):
    """A message of anybody."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None


class FunctionCallInput(RequestModel):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None


class FunctionCallOutputInput(RequestModel):
    """What a call that the model made has given."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None


class ReasoningInput(RequestModel):
    """Reasoning of another model. It is passed over: this server writes none, and nobody else's can be read."""

    type: Literal["reasoning"]
    id: str | None = None


class ItemReference(RequestModel):
    """An output item of an earlier response, by its id."""

    type: Literal["item_reference"] = "item_reference"
    id: str


def _kind(item: Any) -> str | None:
    """The tag of an item. Messages and references need not say what they are."""
    if isinstance(item, BaseModel):
        return f"<{item.type}>"  # type: ignore[attr-defined]
    if not isinstance(item, Mapping):
        return None
    kind = item.get("type") or ("message" if "role" in item else "item_reference")
    return f"<{kind}>"


InputItem: TypeAlias = Annotated[
    Annotated[MessageInput, Tag("<message>")]
    | Annotated[FunctionCallInput, Tag("<function_call>")]
    | Annotated[FunctionCallOutputInput, Tag("<function_call_output>")]
    | Annotated[ReasoningInput, Tag("<reasoning>")]
    | Annotated[ItemReference, Tag("<item_reference>")],
    Discriminator(
        _kind,
        custom_error_type="unsupported_item",
        custom_error_message=(
            "this type of item is not supported; "
            "use message, function_call, function_call_output, reasoning or item_reference"
        ),
    ),
]

Input: TypeAlias = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Many[InputItem], Tag("<list>")], Discriminator(_content_form)
]
