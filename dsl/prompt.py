"""What a call says to the model: messages made of text and variables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast, get_args

from treadle.dsl.errors import PromptError
from treadle.dsl.holes import RENDERING, Rendering
from treadle.dsl.location import caller
from treadle.dsl.var import Var

if TYPE_CHECKING:
    from treadle.dsl.node import CallNode, ToolNode

T = TypeVar("T")

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
Segment: TypeAlias = str | Var[Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call that a model made.

    Attributes:
        id: Unique in the program.
        name: As the model wrote it.
        arguments: JSON text, as the model wrote it.
        node: Its node in the graph; `node.output` is the result, or what is told to the model instead.
    """

    id: str
    name: str
    arguments: str
    node: ToolNode

    @property
    def result(self) -> Var[Any]:
        """What the tool returns; if the call fails, the message that the model gets."""
        return self.node.output


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a prompt.

    Attributes:
        content: Text and variables, in order. A variable stands for `var.value_text()`.
        tool_calls: Of an assistant's turn.
        tool_call_id: Of a tool's result: the call that it answers.
        name: Of a tool's result: the tool.
        source: The node that generated this message; `source.output.token_ids` is what the model wrote, exactly.
    """

    role: Role
    content: tuple[Segment, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    source: CallNode | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the body of a call gave.

    Attributes:
        messages: To send to the model.
        given: The body returned `value`, of the result type, instead of a prompt: the model is not needed.
        value: That value.
    """

    messages: tuple[Message, ...] = ()
    given: bool = False
    value: Any = None

    def variables(self) -> Iterator[Var[Any]]:
        """The holes, in order."""
        for message in self.messages:
            for segment in message.content:
                if isinstance(segment, Var):
                    yield segment


@dataclass(frozen=True, slots=True)
class Draft:
    """What `prompt` returns: a prompt whose holes have been found."""

    messages: tuple[Message, ...]


def prompt(content: str | Var[Any] | Sequence[Message | Mapping[str, Any]], *, system: str | None = None) -> T:  # type: ignore[type-var]  # inferred from the annotation of the body that returns it
    """The prompt of an `@llm` function, to be returned by its body.

    ::

        @llm
        async def review(draft: In[str]) -> Review:
            return prompt(f"Review this draft.\\n\\n{draft}", system="You are a strict editor.")

    To a type checker it has the type that the function is annotated to return: that of the result.

    Args:
        content: Text, which becomes a user message, or messages such as `{"role": "user", "content": f"..."}`.
        system: Text of a system message before them.

    Raises `PromptError` outside of a body, and for what is not a prompt.
    """
    rendering = RENDERING.get()
    if rendering is None:
        raise PromptError(f"{caller()}: prompt(...) makes the prompt of an @llm function: return it from its body")
    messages = [] if system is None else [Message("system", rendering.split(system))]
    if isinstance(content, (str, Var)):
        messages.append(Message("user", _segments(content, rendering)))
    else:
        messages += [_message(item, rendering) for item in content]
    return cast(T, Draft(tuple(messages)))


def _message(item: Message | Mapping[str, Any], rendering: Rendering) -> Message:
    if isinstance(item, Message):
        return item
    role: Any = item.get("role")
    content = item.get("content")
    if role not in get_args(Role) or set(item) - {"role", "content"} or not isinstance(content, (str, Var)):
        raise PromptError(
            f'{caller()}: a message is {{"role": ..., "content": text}} with one of the roles '
            f"{', '.join(get_args(Role))}; this is {dict(item)!r}"
        )
    return Message(role, _segments(content, rendering))


def _segments(content: str | Var[Any], rendering: Rendering) -> tuple[Segment, ...]:
    if isinstance(content, Var):
        rendering.program.check_input(content)
        return (content,)
    return rendering.split(content)
