"""Runs one call of the model: its prompt as far as it is known, the rest as it comes, and the value out of the text."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from treadle.dsl.errors import BudgetExceeded, DSLError, OutputCutOff, OutputError
from treadle.dsl.node import CallNode, Node
from treadle.dsl.program import Program
from treadle.dsl.schema import OutputTypeError
from treadle.dsl.var import Var
from treadle.grammar import (
    Choice,
    Constraint,
    GrammarError,
    JSONSchema,
    ToolSpec,
    ToolTurn,
    TurnDelta,
    TurnStream,
    constraint_to_json,
)
from treadle.grammar.compiler import Compiler
from treadle.runtime.engine.session import CallStream, Session
from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.executor.outputs import OutputCheck
from treadle.runtime.executor.prompts import Part, PromptEncoder, Recorded, Turn
from treadle.runtime.executor.released import ReleasedIds
from treadle.runtime.text.tokenizer import Tokenizer
from treadle.scheduler import AppendPrompt, CallFinished, SamplingParams, SubmitCall

DEFAULT_MAX_TOKENS = 512
SAMPLES_TEMPERATURE = 0.8
"""Of further samples, and of further attempts, whose temperature nobody chose: the same again would be of no use."""


class CallRunner:
    """Turns a `CallNode` into calls of the engine, and their tokens into its value."""

    def __init__(self, model: str, session: Session, tokenizer: Tokenizer, compiler: Compiler) -> None:
        self._model = model
        self._session = session
        self._tokenizer = tokenizer
        self._compiler = compiler
        self._prompts = PromptEncoder(tokenizer)
        self._stops = frozenset(tokenizer.eos_token_ids)
        self._spent: WeakKeyDictionary[Program, int] = WeakKeyDictionary()
        self._last_call: WeakKeyDictionary[Node, str] = WeakKeyDictionary()
        self._complete: WeakKeyDictionary[Node, asyncio.Event] = WeakKeyDictionary()

    async def run(self, node: CallNode) -> None:
        """Resolves the node's output, or raises why it cannot."""
        self._check_model(node)
        async with asyncio.timeout(node.options.timeout):
            prompt = await node.render()
            if prompt.given:
                node.output.resolve(prompt.value)
                return
            tools = node.options.tools
            turns = self._prompts.turns(prompt.messages, tools)
            constraint, check = await self._compiled(node)
            failure: OutputError | None = None
            for attempt in range(check.retries + 1):
                parts = self._prompts.encode(turns, tools)
                try:
                    output = await self._generate(node, parts, constraint, attempt, check)
                except InvalidRequestError as refused:
                    if failure is None:
                        raise
                    raise failure from refused  # with the correction, the prompt does not fit the context any more
                try:
                    value = self._value(node, output, check)
                except OutputCutOff:
                    raise
                except OutputError as error:
                    if attempt == check.retries:
                        raise
                    failure = error
                    correction = f"That is not right: {error.reason}\nAnswer again, and correct it."
                    turns = [*turns, Turn("assistant", [Recorded(output.token_ids)]), Turn("user", [correction])]
                else:
                    if not output.was_pushed:
                        node.output.push(output.text, output.text_ids)
                    node.output.resolve(value, output.token_ids, output.text)
                    return

    def _check_model(self, node: CallNode) -> None:
        if node.options.model not in (None, self._model):
            raise DSLError(f"{node}: this runtime runs {self._model!r}, not {node.options.model!r}; leave out `model`")

    def _budget_left(self, node: CallNode) -> int | None:
        """Tokens that the programs around a call may still use. Raises `BudgetExceeded` if there are none."""
        left: int | None = None
        for program in (node.program, *node.program.ancestors):
            if program.budget_tokens is None:
                continue
            rest = program.budget_tokens - self._spent.get(program, 0)
            if rest <= 0:
                text = f"program {program.name!r} has used its {program.budget_tokens} tokens"
                raise BudgetExceeded(f"{node}: {text}; give it a larger budget_tokens")
            left = rest if left is None else min(left, rest)
        return left

    def _spend(self, node: CallNode, finished: CallFinished) -> None:
        usage = finished.usage
        for program in (node.program, *node.program.ancestors):
            used = usage.cached + usage.prefilled + usage.decoded
            self._spent[program] = self._spent.get(program, 0) + used

    async def _compiled(self, node: CallNode) -> tuple[str | None, OutputCheck]:
        """The node's constraint in wire form, and the check of what it leaves open.

        The grammar is in the compiler's cache from now on. Raises `OutputTypeError` for a schema that is refused.
        """
        constraint = constraint_of(node)
        if constraint is None:
            return None, OutputCheck(node, ())
        try:
            grammar = await self._compiler.compile_async(constraint)
        except GrammarError as error:
            raise OutputTypeError(f"{node}: {error}") from error
        return constraint_to_json(constraint), OutputCheck(node, grammar.unenforced)

    async def _generate(
        self, node: CallNode, parts: Sequence[Part], constraint: str | None, attempt: int, check: OutputCheck
    ) -> _Output:
        """One call of the engine, whose text and ids are pushed as they come if they will be the value's."""
        if node.fork_of is not None and not attempt:
            parts = await self._parts_of_fork(node.fork_of, parts)
        stream = self._submit(node, parts, constraint, attempt)
        is_open = _first_hole(parts) is not None
        feeder = asyncio.create_task(self._feed(node, stream, parts)) if is_open else None
        calls = _ToolCalls(node, check) if node.options.tools else None
        pushes = calls is None and check.is_final
        released = ReleasedIds(self._tokenizer)
        text = ""
        token_ids: tuple[int, ...] = ()
        try:
            async for tokens in stream:
                ids = tuple(i for i in tokens.token_ids if i not in self._stops)
                text, token_ids = text + tokens.text, token_ids + ids
                ready = released.push(ids, tokens.text)
                if calls is not None:
                    calls.push(tokens.text)
                elif pushes:
                    node.output.push(tokens.text, ready)
            finished = stream.finished
            assert finished is not None
            self._spend(node, finished)
            if feeder is not None:
                await feeder
            text += finished.text
            ready = released.finish(finished.text)
            if pushes:
                node.output.push(finished.text, ready)
            text_ids = released.token_ids
            if calls is not None and (content := calls.finish(finished.text)) != text:
                text, text_ids = content, tuple(self._tokenizer.encode(content))
            return _Output(text, text_ids, token_ids, finished.reason, pushes)
        except InvalidRequestError:
            if feeder is not None and feeder.done() and (cause := feeder.exception()) is not None:
                raise cause from None
            raise
        finally:
            stream.abort()
            if feeder is not None:
                feeder.cancel()
                await asyncio.gather(feeder, return_exceptions=True)

    async def _parts_of_fork(self, parent: CallNode, parts: Sequence[Part]) -> list[Part]:
        """The whole prompt, once it is there and the parent's is too: a fork then computes one token of it."""
        ids: tuple[int, ...] = ()
        for part in parts:
            if isinstance(part, Var):
                async with aclosing(self._ids_of(part)) as pieces:
                    async for piece in pieces:
                        ids += piece
            else:
                ids += part
        complete = self._prompt_complete(parent)
        parent.output.on_done(lambda _: complete.set())
        await complete.wait()
        return [ids]

    def _prompt_complete(self, node: CallNode) -> asyncio.Event:
        return self._complete.setdefault(node, asyncio.Event())

    def _submit(self, node: CallNode, parts: Sequence[Part], constraint: str | None, attempt: int) -> CallStream:
        max_tokens = node.options.max_tokens or DEFAULT_MAX_TOKENS
        budget = self._budget_left(node)
        known: list[int] = []
        for part in parts:
            if isinstance(part, Var):
                break
            known += part
        is_open = _first_hole(parts) is not None
        call = SubmitCall(
            _call_id(node, attempt),
            node.program.id,
            tuple(known),
            self._sampling(node, attempt),
            max_tokens if budget is None else min(max_tokens, budget),
            open=is_open,
            fork_of=None if is_open else self._parent(node, attempt),
            node_id=node.id,
            extends=self._last_call.get(node.extends) if node.extends is not None else None,
            constraint=constraint,
        )
        (stream,) = self._session.submit(call)
        self._last_call[node] = call.call_id
        if not is_open:
            self._prompt_complete(node).set()
        return stream

    def _parent(self, node: CallNode, attempt: int) -> str | None:
        """The call to fork from, if it is still there: the first sample of the same fan-out."""
        if node.fork_of is None or attempt:
            return None
        parent = _call_id(node.fork_of, 0)
        return parent if self._session.is_live(parent) else None

    async def _feed(self, node: CallNode, stream: CallStream, parts: Sequence[Part]) -> None:
        """Appends what was missing, piece by piece as it comes, and closes the prompt."""
        rest = parts[_first_hole(parts) :]
        try:
            for part in rest:
                if not isinstance(part, Var):
                    self._append(stream, part)
                    continue
                async with aclosing(self._ids_of(part)) as pieces:
                    async for ids in pieces:
                        self._append(stream, ids)
            self._append(stream, (), close=True)
            self._prompt_complete(node).set()
        except BaseException:
            stream.abort()
            raise

    def _append(self, stream: CallStream, ids: tuple[int, ...], *, close: bool = False) -> None:
        if (ids or close) and self._session.is_live(stream.call_id):
            self._session.send(AppendPrompt(stream.call_id, ids, close))

    async def _ids_of(self, var: Var[Any]) -> AsyncGenerator[tuple[int, ...], None]:
        """A value's ids: those that were generated and released, as they come, or its text's once it is there."""
        streamed = False
        if isinstance(var.node, CallNode):
            async for _, ids in var.pieces():
                if ids:
                    streamed = True
                    yield ids
        await var
        if not streamed:
            yield tuple(self._tokenizer.encode(var.value_text()))

    def _sampling(self, node: CallNode, attempt: int) -> SamplingParams:
        options = node.options
        temperature = options.temperature
        if temperature is None:
            temperature = SAMPLES_TEMPERATURE if node.fork_of is not None or attempt else 0.0
        seed = secrets.randbits(62) if options.seed is None else options.seed
        return SamplingParams(
            temperature=temperature,
            top_p=options.top_p if options.top_p is not None else 1.0,
            seed=seed + 1_000_003 * attempt,
            stop=options.stop,
            stop_token_ids=self._tokenizer.eos_token_ids,
        )

    def _value(self, node: CallNode, output: _Output, check: OutputCheck) -> Any:
        if output.reason == "length" and check.must_be_whole(output.text):
            limit = node.options.max_tokens or DEFAULT_MAX_TOKENS
            raise OutputCutOff(f"{node}: the output was cut off after {limit} tokens; give a larger max_tokens")
        if output.reason == "aborted":
            raise DSLError(f"{node}: the call was aborted in the engine")
        return check.value(output.text)


@dataclass(frozen=True, slots=True)
class _Output:
    """What a call generated.

    Attributes:
        text: Without stop string and tool calls.
        text_ids: What stands for the text in other prompts.
        token_ids: All that was generated but for the token that ended it.
        was_pushed: Whether text and ids are in the node's variable already.
    """

    text: str
    text_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    reason: str
    was_pushed: bool


class _ToolCalls:
    """Hands the tool calls of a turn to its node, each as soon as its text is complete, and keeps the other text."""

    def __init__(self, node: CallNode, check: OutputCheck) -> None:
        self._node = node
        self._check = check
        self._stream = TurnStream()
        self._content = ""

    def push(self, text: str) -> None:
        self._take(self._stream.push(text))

    def finish(self, text: str) -> str:
        """Takes the last text. Returns what was not part of a tool call."""
        self.push(text)
        self._take(self._stream.finish())
        return self._content

    def _take(self, delta: TurnDelta) -> None:
        self._content += delta.content
        for call in delta.calls:
            wrong = self._check.wrong_arguments(call.name, call.arguments)
            self._node.on_tool_call(call.index, call.name, call.arguments, wrong)


def constraint_of(node: CallNode) -> Constraint | None:
    """What the grammar must enforce for a node; None for free text."""
    schema = None
    if node.output_schema is not None:
        schema = JSONSchema(json.dumps(node.output_schema, ensure_ascii=False), strict=node.options.strict)
    if node.options.tools:
        specs = [ToolSpec(tool.name, tool.description, json.dumps(tool.parameters)) for tool in node.options.tools]
        return ToolTurn(tuple(specs), answer=schema)
    if node.output_choices is not None:
        return Choice(node.output_choices)
    return schema


def _call_id(node: Node, attempt: int) -> str:
    return f"{node.program.id}/{node.id}/{attempt}"


def _first_hole(parts: Sequence[Part]) -> int | None:
    return next((index for index, part in enumerate(parts) if isinstance(part, Var)), None)
