"""Runs the workflows that Treadle's executor runs as a client of an LLM server does: it knows requests, not programs.

Every call is a program of its own, and is sent when its prompt is complete. Samples are calls with the whole prompt;
tools start when the turn that called them has ended. Prompts are the very token ids that the executor makes, sampling
and grammars are the same, and the engine's prefix cache serves both.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import dataclass
from typing import Any

from treadle.dsl.node import CallNode, Node, ToolNode
from treadle.dsl.program import Program
from treadle.dsl.var import Var
from treadle.grammar import TurnStream, constraint_to_json
from treadle.grammar.compiler import Compiler
from treadle.runtime.engine.session import Session
from treadle.runtime.executor.calls import DEFAULT_MAX_TOKENS, constraint_of
from treadle.runtime.executor.prompts import PromptEncoder
from treadle.runtime.executor.released import ReleasedIds
from treadle.runtime.text.tokenizer import Tokenizer
from treadle.scheduler import SamplingParams, SubmitCall, Usage


@dataclass(frozen=True, slots=True)
class _Reply:
    """What a call generated: its text, the ids that stand for it in other prompts, and all but one that ended it."""

    text: str
    text_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


class PlainClient:
    """A `Backend` of the DSL that sends complete prompts.

    Args:
        one_by_one: Whether each call and tool is awaited before the next is begun; otherwise whatever has its inputs
            runs, as under `asyncio.gather`.

    Attributes:
        usages: Of the calls that have ended.
    """

    def __init__(self, session: Session, tokenizer: Tokenizer, compiler: Compiler, *, one_by_one: bool) -> None:
        self.usages: list[Usage] = []
        self._session = session
        self._tokenizer = tokenizer
        self._compiler = compiler
        self._prompts = PromptEncoder(tokenizer)
        self._turn: contextlib.AbstractAsyncContextManager[Any]
        self._turn = asyncio.Lock() if one_by_one else contextlib.nullcontext()
        self._tasks: dict[Node, asyncio.Task[None]] = {}

    async def open_program(self, program: Program) -> None:
        return

    async def close_program(self, program: Program, error: BaseException | None) -> None:
        tasks = [task for node, task in self._tasks.items() if node.program is program]
        await asyncio.gather(*tasks, return_exceptions=True)

    def start(self, node: Node) -> None:
        if not node.output.is_done and isinstance(node, (CallNode, ToolNode)):
            task = asyncio.create_task(self._run(node))
            self._tasks[node] = task
            task.add_done_callback(lambda _: self._tasks.pop(node, None))

    def cancel(self, node: Node) -> None:
        if node in self._tasks:
            self._tasks[node].cancel()

    async def _run(self, node: CallNode | ToolNode) -> None:
        node.begin()
        try:
            await (self._call(node) if isinstance(node, CallNode) else self._tool(node))
        except Exception as error:
            node.output.fail(error)

    async def _tool(self, node: ToolNode) -> None:
        arguments = await node.ready_arguments()
        async with self._turn:
            result = await node.run(arguments)
        node.output.resolve(result)

    async def _call(self, node: CallNode) -> None:
        prompt = await node.render()
        assert not prompt.given and not node.options.retries, f"{node}: what a plain client does not do"
        parts = self._prompts.encode(self._prompts.turns(prompt.messages, node.options.tools), node.options.tools)
        token_ids: tuple[int, ...] = ()
        for part in parts:
            token_ids += await self._ids_of(part) if isinstance(part, Var) else part
        async with self._turn:
            reply = await self._generate(node, token_ids)
        text = _told_tool_calls(node, reply.text) if node.options.tools else reply.text
        node.output.push(text, reply.text_ids if text == reply.text else ())
        node.output.resolve(node.parse(text), reply.token_ids, text)

    async def _ids_of(self, var: Var[Any]) -> tuple[int, ...]:
        """The ids of a value, once it is there; as in the executor, those that the model wrote if they are its text."""
        await var
        pieces = [ids async for _, ids in var.pieces()] if isinstance(var.node, CallNode) else []
        return tuple(itertools.chain(*pieces)) or tuple(self._tokenizer.encode(var.value_text()))

    async def _generate(self, node: CallNode, token_ids: tuple[int, ...]) -> _Reply:
        constraint = constraint_of(node)
        if constraint is not None:
            await self._compiler.compile_async(constraint)
        options = node.options
        assert options.temperature is not None, f"{node}: say at which temperature, for all ways alike"
        program_id = self._session.open_program(node.name, node.program.tenant)
        (stream,) = self._session.submit(
            SubmitCall(
                self._session.new_id("plain"),
                program_id,
                token_ids,
                SamplingParams(
                    temperature=options.temperature,
                    top_p=1.0 if options.top_p is None else options.top_p,
                    seed=options.seed or 0,
                    stop=options.stop,
                    stop_token_ids=self._tokenizer.eos_token_ids,
                ),
                options.max_tokens or DEFAULT_MAX_TOKENS,
                constraint=None if constraint is None else constraint_to_json(constraint),
            )
        )
        text = ""
        ids: list[int] = []
        stops = self._tokenizer.eos_token_ids
        async for tokens in stream:
            text += tokens.text
            ids += (token_id for token_id in tokens.token_ids if token_id not in stops)
        assert stream.finished is not None
        self.usages.append(stream.finished.usage)
        await self._session.end_program(program_id)
        text += stream.finished.text
        released = ReleasedIds(self._tokenizer)
        released.push(ids, text)
        released.finish("")
        return _Reply(text, released.token_ids, tuple(ids))


def _told_tool_calls(node: CallNode, text: str) -> str:
    """Gives the tool calls of a whole turn to its node. Returns the rest of the text."""
    stream = TurnStream()
    deltas = [stream.push(text), stream.finish()]
    for call in (call for delta in deltas for call in delta.calls):
        node.on_tool_call(call.index, call.name, call.arguments)
    return "".join(delta.content for delta in deltas)
