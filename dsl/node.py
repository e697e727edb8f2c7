"""The nodes of a program's graph: calls of the model, tools, joins."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from treadle.dsl.errors import FailureStep, NodeCancelled, NodeFailed, ToolError
from treadle.dsl.location import Location, caller
from treadle.dsl.prompt import Prompt
from treadle.dsl.schema import OutputType
from treadle.dsl.var import Var, text_of
from treadle.dsl.varlist import replace_vars

if TYPE_CHECKING:
    from treadle.dsl.program import Program
    from treadle.dsl.tool import Tool

InThread: TypeAlias = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a function without holding up the event loop."""

NodeState: TypeAlias = Literal["pending", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class LLMOptions:
    """How a call is made. None leaves the choice to the backend.

    Attributes:
        model: A model that the backend knows.
        max_tokens: Most tokens to generate. Text ends there; a typed value or a tool call that is not complete by then
            is an `OutputCutOff`.
        temperature: 0 chooses the most likely token.
        top_p: Keep the smallest set of tokens whose probabilities reach this sum.
        seed: The same seed gives the same noise, whatever else runs. Sample i of a fan-out uses seed + i.
        system: Text of a system message before the prompt.
        stop: Strings that end the call. The value is the text before.
        retries: How often to ask again when the output does not fit its type. Each time the model is shown what it
            wrote and what is wrong with it, and the seed is another. None: twice if decoding cannot enforce all of the
            type's schema, else never.
        timeout: Seconds for the whole call, retries included.
        strict: A keyword of the schema that decoding cannot enforce is an error before anything is generated. If
            False, what was generated is validated against it, with `retries`.
        tools: That the model may call; of a conversation only.
    """

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    system: str | None = None
    stop: tuple[str, ...] = ()
    retries: int | None = None
    timeout: float | None = None
    strict: bool = False
    tools: tuple[Tool[..., Any], ...] = ()


class Node:
    """One node of a program's graph. `str` gives its name and the user's line.

    Attributes:
        id: Unique in its program and in those nested in the same outermost program.
        kind: `llm`, `tool` or `gather`.
        name: Of the function, for people.
        program: That it belongs to.
        location: The user's line that made it.
        output: Its value.
        inputs: Nodes whose values it needs, without repetition. They may belong to another program: an outer one, or
            one that has ended. Variables that only the body knows are added while it is rendered.
        extends: The node whose conversation it continues; it is among the inputs.
        caller: Of a tool call that a model made: the turn that made it. Not an input: it may start before that ends.
        group: Shared by the branches of one fan-out.
        sample: Its place in the group.
        state: `pending`, `running`, `done`, `failed` or `cancelled`.
        error: Of a failed node. A tool call of a model has an error *and* a value, the message to the model.
        declared_at, started_at, finished_at: In seconds of `time.monotonic`.
    """

    def __init__(
        self,
        program: Program,
        kind: str,
        name: str,
        inputs: Iterable[Var[Any]] = (),
        *,
        location: Location | None = None,
        extends: Node | None = None,
        caller_node: Node | None = None,
        group: str | None = None,
        sample: int | None = None,
    ) -> None:
        self.id = program.new_node_id()
        self.kind = kind
        self.name = name
        self.program = program
        self.location = location or caller()
        self.output: Var[Any] = Var(self)
        self.extends = extends
        self.caller = caller_node
        self.group = group
        self.sample = sample
        self.state: NodeState = "pending"
        self.error: BaseException | None = None
        self.declared_at = time.monotonic()
        self.started_at: float | None = None
        self.finished_at: float | None = None
        nodes = [var.node for var in inputs]
        self._inputs = dict.fromkeys([extends, *nodes] if extends else nodes)

    @property
    def inputs(self) -> tuple[Node, ...]:
        return tuple(self._inputs)

    def add_input(self, node: Node) -> None:
        """Adds an edge that was found after the declaration."""
        if node not in self._inputs:
            self._inputs[node] = None
            self.program.graph.connect(node, self)

    def begin(self) -> None:
        """Says that it runs from now on."""
        if self.state == "pending":
            self.state = "running"
            self.started_at = time.monotonic()

    def finish(self, error: BaseException | None) -> None:
        """Follows its variable, which was resolved or has failed. Called by the variable only."""
        self.finished_at = time.monotonic()
        self.error = self.error or error
        if self.error is None:
            self.state = "done"
        else:
            self.state = "cancelled" if isinstance(self.error, NodeCancelled) else "failed"

    def explain(self, error: BaseException) -> BaseException:
        """The error as those who await this node see it: that of an input gets the path of the failure."""
        if isinstance(error, asyncio.CancelledError):
            return NodeCancelled(f"{self} was cancelled")
        for node in self._inputs:
            if node.output.error is error and not isinstance(error, NodeCancelled):
                here = FailureStep(self.name, self.location)
                if isinstance(error, NodeFailed):
                    return NodeFailed(self, error.cause, (here, *error.path))
                return NodeFailed(self, error, (here, FailureStep(node.name, node.location)))
        return error

    def write(self, value: Any) -> str:
        """How its value is written into a prompt."""
        return text_of(value)

    def recover(self, error: BaseException) -> str | None:
        """The value to give in place of a failure, if there is one."""
        return None

    def __str__(self) -> str:
        return f"{self.name} ({self.location})"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.kind} {self.name} {self.state}>"


class CallNode(Node):
    """One call of the model.

    Attributes:
        options: How it is made.
        output_type: The declared type of the value.
        output_schema: JSON Schema of what the model must write; None for text.
        output_choices: If the value is one of some strings (`Literal`, or an enum of strings): those; the model writes
            one of them bare, without quotes. There is no schema then.
        fork_of: Of a sample: the first sample, which has the same prompt.
    """

    def __init__(
        self,
        program: Program,
        name: str,
        inputs: Iterable[Var[Any]],
        renderer: Callable[[CallNode], Awaitable[Prompt]],
        output: OutputType,
        options: LLMOptions,
        *,
        location: Location | None = None,
        extends: Node | None = None,
        group: str | None = None,
        sample: int | None = None,
        fork_of: CallNode | None = None,
    ) -> None:
        super().__init__(program, "llm", name, inputs, location=location, extends=extends, group=group, sample=sample)
        self.options = options
        self.fork_of = fork_of
        self.output_type: Any = output.type
        self.output_schema = output.schema
        self.output_choices = output.choices
        self._parse = output.parse
        self._renderer = renderer

    async def render(self) -> Prompt:
        """Runs the body: the messages, or the value that the body gave. The samples of one fan-out share one run.

        Raises what the body raises, which may be the failure of an input.
        """
        prompt = await self._renderer(self)
        for var in prompt.variables():
            self.add_input(var.node)
        return prompt

    def parse(self, text: str) -> Any:
        """The value of what the model wrote. Raises `OutputError`, readable by the model, if it does not fit."""
        return self._parse(text)

    def on_tool_call(self, index: int, name: str, arguments: str, wrong: str | None = None) -> Var[Any] | None:
        """Takes a tool call of this turn, as soon as its arguments are complete; see `turn.ChatNode`."""
        raise AssertionError(f"{self} has no tools")


class ToolNode(Node):
    """One run of a tool.

    Attributes:
        tool: With its time limit, retries, effects and concurrency limit, which the backend observes.
        arguments: By parameter name; a variable stands for its value, also inside of lists and dicts.
        forgiving: The model made this call: a failure becomes its value, a message to the model.
    """

    def __init__(
        self,
        program: Program,
        tool: Tool[..., Any],
        arguments: Mapping[str, Any],
        inputs: Iterable[Var[Any]] = (),
        *,
        location: Location | None = None,
        caller_node: Node | None = None,
    ) -> None:
        super().__init__(program, "tool", tool.name, inputs, location=location, caller_node=caller_node)
        self.tool = tool
        self.arguments = dict(arguments)
        self.forgiving = caller_node is not None

    async def ready_arguments(self) -> dict[str, Any]:
        """Waits for the variables among the arguments, and checks the types.

        Raises the failure of a variable, or `ToolArgumentsError`.
        """
        values = {name: await replace_vars(argument) for name, argument in self.arguments.items()}
        return self.tool.check(values)

    async def run(self, arguments: Mapping[str, Any], in_thread: InThread = asyncio.to_thread) -> Any:
        """Runs the tool once. A function that is not async runs `in_thread`; calls that it makes join the program.

        Time limit, retries and concurrency are for the backend. Raises `ToolError` from what the tool raised.
        """
        return await self.tool.run(arguments, self.program, in_thread)

    def recover(self, error: BaseException) -> str | None:
        if not self.forgiving or isinstance(error, NodeCancelled):
            return None
        self.error = error
        return f"Error: {error}" if isinstance(error, ToolError) else f"Error: {type(error).__name__}: {error}"
