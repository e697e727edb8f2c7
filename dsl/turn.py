"""One turn of a conversation: a call of the model that may call tools."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, cast

from treadle.dsl.errors import DSLError, ToolArgumentsError
from treadle.dsl.location import caller
from treadle.dsl.node import CallNode, LLMOptions, ToolNode
from treadle.dsl.prompt import Message, Prompt, ToolCall
from treadle.dsl.schema import OutputType
from treadle.dsl.tool import Tool
from treadle.dsl.var import Var, text_of

if TYPE_CHECKING:
    from treadle.dsl.program import Program

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True, repr=False)
class Turn(Generic[T_co]):
    """What the model said in one turn of a conversation.

    Attributes:
        text: Without the tool calls.
        calls: The tools that it calls; none, if this is its answer.
        node: The call in the graph.
    """

    text: str
    calls: tuple[ToolCall, ...]
    node: ChatNode
    _answer: Any

    @property
    def answer(self) -> T_co:
        """The answer, of the type that the conversation returns. Raises `DSLError` if the turn calls tools instead."""
        if self.calls:
            names = ", ".join(call.name for call in self.calls)
            raise DSLError(f"{caller()}: this turn is no answer but calls {names}: write `await chat.run_tools(turn)`")
        return cast(T_co, self._answer)

    def __repr__(self) -> str:
        return f"Turn({self.text!r}, calls=[{', '.join(f'{call.name}({call.arguments})' for call in self.calls)}])"


class ChatNode(CallNode):
    """A turn of a conversation. `options.tools` are the tools that it may call.

    The model writes tool calls, or an answer that fits `output_schema` (text, if that is None). The backend tells each
    call with `on_tool_call` as soon as its arguments are complete, and at the end resolves `output` with `parse(text)`,
    `text` being what is not part of a tool call. `output.token_ids` should be the whole turn.
    """

    def __init__(
        self,
        program: Program,
        messages: tuple[Message, ...],
        inputs: Iterable[Var[Any]],
        answer: OutputType,
        options: LLMOptions,
        *,
        runs_tools: bool,
        extends: ChatNode | None,
    ) -> None:
        super().__init__(program, "chat", inputs, self._prompt, answer, options, extends=extends)
        self.messages = messages
        self.calls: dict[int, ToolCall] = {}
        self._runs_tools = runs_tools
        self._held: list[ToolNode] = []
        self.output.on_done(self._ended)

    async def render(self) -> Prompt:
        return Prompt(self.messages)

    async def _prompt(self, node: CallNode) -> Prompt:
        return Prompt(self.messages)

    def on_tool_call(self, index: int, name: str, arguments: str, wrong: str | None = None) -> Var[Any] | None:
        """Takes the call number `index` of this turn, once its arguments (JSON text) are complete.

        `wrong` says what the backend found wrong with the arguments, beyond what the tool itself checks.
        Returns its result, if the tool was started, or the message to the model, if the call is not one that can run
        (no such tool, or arguments that do not fit). Returns None if the tool is to start later: one with
        `effects="once"` when the turn is complete, all when the workflow said that it runs the tools itself. Telling
        the same index again, as a retry does, changes nothing.
        """
        if index in self.calls:
            return self.calls[index].result
        tool = next((tool for tool in self.options.tools if tool.name == name), None)
        known = tool or _missing(name)
        node = ToolNode(self.program, known, {}, location=self.location, caller_node=self)
        try:
            if tool is None:
                names = ", ".join(tool.name for tool in self.options.tools)
                raise ToolArgumentsError(f"there is no tool {name!r}; the tools are: {names}")
            if wrong is not None:
                raise ToolArgumentsError(f"wrong arguments for {name}: {wrong}")
            node.arguments = tool.validate(arguments)
        except ToolArgumentsError as error:
            node.output.fail(error)
        self.calls[index] = ToolCall(f"{self.id}.{index}", name, arguments, node)
        if node.output.is_done or (self._runs_tools and known.effects != "once"):
            self.program.declare(node)
            return node.output
        self._held.append(node)
        return None

    def start_tools(self) -> None:
        """Starts the tools that were held back."""
        held, self._held = self._held, []
        for node in held:
            self.program.declare(node)

    def parse(self, text: str) -> Turn[Any]:
        """The turn. Raises `OutputError` if it calls no tool and its text does not fit the answer."""
        calls = tuple(call for _, call in sorted(self.calls.items()))
        return Turn(text, calls, self, None if calls else super().parse(text))

    def write(self, value: Any) -> str:
        return value.text if isinstance(value, Turn) else text_of(value)

    def _ended(self, var: Var[Any]) -> None:
        if var.error is not None:
            for call in self.calls.values():
                call.result.cancel()
        elif self._runs_tools:
            self.start_tools()


def _missing(name: str) -> Tool[[], NoReturn]:
    """Takes the place of a tool that a model made up."""

    def missing() -> NoReturn:
        raise DSLError(f"there is no tool {name!r}")

    return Tool(missing, name=name, typical=None, timeout=None, retries=0, effects="once", concurrency=None)
