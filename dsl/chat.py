"""Conversations with tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar, Unpack, overload

from treadle.dsl.errors import DSLError, StepLimitError
from treadle.dsl.holes import RENDERING
from treadle.dsl.llm import TurnOptions, with_options
from treadle.dsl.location import caller
from treadle.dsl.node import LLMOptions
from treadle.dsl.program import program_for
from treadle.dsl.prompt import Message, Segment
from treadle.dsl.schema import output_type
from treadle.dsl.tool import Tool
from treadle.dsl.turn import ChatNode, Turn
from treadle.dsl.var import In, Var

T = TypeVar("T")
R = TypeVar("R")


class Chat(Generic[T]):
    """A conversation, whose turns extend one another. The model may call tools.

    The whole loop, and the same by hand::

        chat = Chat("Use the tools.", tools=[search], returns=Finding)
        finding = await chat.ask("Who wove the first carpet?")

        turn = await chat.send("Who wove the first carpet?")
        while turn.calls:
            turn = await chat.run_tools(turn)
        finding = turn.answer

    All calls of a turn run at the same time. A call that fails, or whose arguments do not fit, gives the model a
    message instead of a result. `ask` starts a tool as soon as its arguments are complete, while the model still writes
    the rest of the turn, unless the tool has `effects="once"`; by hand, tools start in `run_tools`.

    Args:
        system: Text of the system message.
        tools: That the model may call.
        returns: The type of the answer; text, if not given.
        options: As of `@llm`.
    """

    @overload
    def __init__(
        self: Chat[str],
        system: str | None = None,
        *,
        tools: Sequence[Tool[..., Any]] = (),
        returns: None = None,
        **options: Unpack[TurnOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: Chat[R],
        system: str | None = None,
        *,
        tools: Sequence[Tool[..., Any]] = (),
        returns: type[R],
        **options: Unpack[TurnOptions],
    ) -> None: ...
    def __init__(
        self,
        system: str | None = None,
        *,
        tools: Sequence[Tool[..., Any]] = (),
        returns: Any = None,
        **options: Unpack[TurnOptions],
    ) -> None:
        names = [tool.name for tool in tools]
        if len(set(names)) < len(names):
            raise DSLError(f"{caller()}: two tools have the same name: {', '.join(names)}")
        self._options = with_options(LLMOptions(tools=tuple(tools)), options)
        self._answer = output_type(str if returns is None else returns, f"Chat ({caller()})")
        self._messages: tuple[Message, ...] = (Message("system", (system,)),) if system else ()
        self._last: Turn[T] | None = None
        self._running = False

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far."""
        return self._messages

    async def send(self, *content: In[str]) -> Turn[T]:
        """Adds a message of the user, made of texts and variables, and returns the model's turn.

        Raises `DSLError` if the turn before calls tools that have not been run. A turn that fails leaves the
        conversation as it was.
        """
        return await self._send(content, runs_tools=False)

    async def run_tools(self, turn: Turn[T]) -> Turn[T]:
        """Runs the tools that a turn calls, all at the same time, and returns the model's next turn."""
        return await self._run_tools(turn, runs_tools=False)

    async def ask(self, *content: In[str], max_steps: int = 8) -> T:
        """Sends a message and runs the tools that the model calls until it answers.

        Raises `StepLimitError` if `max_steps` turns bring no answer, and `OutputError` for an answer that does not fit;
        an `OutputCutOff` if `max_tokens` were too few for it. Text that reaches `max_tokens` ends there, as an answer.
        """
        if max_steps < 1:
            raise DSLError(f"{caller()}: max_steps is {max_steps}; there is at least 1")
        turn = await self._send(content, runs_tools=max_steps > 1)
        for step in range(2, max_steps + 1):
            if not turn.calls:
                break
            turn = await self._run_tools(turn, runs_tools=step < max_steps)
        if turn.calls:
            raise StepLimitError(
                f"{caller()}: no answer in {max_steps} turns; the last one calls "
                f"{', '.join(call.name for call in turn.calls)}. Give more max_steps, or continue with run_tools(turn)"
            )
        return turn.answer

    async def _send(self, content: Sequence[Segment], *, runs_tools: bool) -> Turn[T]:
        if self._last is not None and self._last.calls:
            raise DSLError(f"{caller()}: the last turn calls tools: write `await chat.run_tools(turn)` first")
        rendering = RENDERING.get()
        segments = tuple(
            part
            for item in content
            for part in (rendering.split(item) if rendering and isinstance(item, str) else (item,))
        )
        variables = [part for part in segments if isinstance(part, Var)]
        return await self._turn((Message("user", segments),), variables, runs_tools)

    async def _run_tools(self, turn: Turn[T], *, runs_tools: bool) -> Turn[T]:
        if turn is not self._last or not turn.calls:
            raise DSLError(f"{caller()}: run_tools takes the last turn of this conversation, if it calls tools")
        turn.node.start_tools()
        results = tuple(Message("tool", (call.result,), tool_call_id=call.id, name=call.name) for call in turn.calls)
        return await self._turn(results, [call.result for call in turn.calls], runs_tools)

    async def _turn(self, new: tuple[Message, ...], variables: Sequence[Var[Any]], runs_tools: bool) -> Turn[T]:
        if self._running:
            raise DSLError(f"{caller()}: a turn of this conversation is still running; use another Chat beside it")
        messages = (*self._messages, *new)
        node = ChatNode(
            program_for("chat", variables),
            messages,
            variables,
            self._answer,
            self._options,
            runs_tools=runs_tools,
            extends=self._last.node if self._last else None,
        )
        node.program.declare(node)
        self._running = True
        try:
            turn: Turn[T] = await node.output
        finally:
            self._running = False
        self._messages = (*messages, Message("assistant", (node.output,), turn.calls, source=node))
        self._last = turn
        return turn
