"""A backend that keeps the whole contract of `treadle.dsl.Backend`, with a function in place of the model."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from treadle.dsl.errors import OutputError, ToolTimeout
from treadle.dsl.node import CallNode, ToolNode
from treadle.dsl.schema import OutputTypeError
from treadle.grammar import GrammarError, ToolSpec
from treadle.grammar.sources import call_source, schema_source
from treadle.runtime.executor.outputs import OutputCheck


@dataclass(frozen=True)
class Reply:
    """What the model writes: text, tool calls as (name, arguments), how long the turn goes on after them."""

    text: str = ""
    calls: tuple = ()
    seconds: float = 0.0


class FakeBackend:
    """`model(text)` gives a `Reply`, a str or an exception for a prompt, whose messages are written `role: content`."""

    def __init__(self, model: Callable = lambda text: "ok") -> None:
        self.model = model
        self.prompts: list[str] = []
        self.started: list = []
        self.events: list[str] = []
        self.errors: dict = {}
        self._tasks: dict = {}
        self._slots: dict = {}

    async def open_program(self, program) -> None:
        self.events.append(f"open {program.name}")
        await asyncio.sleep(0)

    def start(self, node) -> None:
        self.started.append(node)
        if node.output.is_done or node.kind == "gather":
            return
        task = asyncio.get_running_loop().create_task(self._carry_out(node))
        self._tasks[node] = task
        task.add_done_callback(lambda _: self._tasks.pop(node, None))

    def cancel(self, node) -> None:
        if node in self._tasks:
            self._tasks[node].cancel()

    async def close_program(self, program, error) -> None:
        tasks = [task for node, task in self._tasks.items() if node.program is program]
        await asyncio.gather(*tasks, return_exceptions=True)
        self.errors[program.name] = error
        self.events.append(f"close {program.name}")
        program.account = {"calls": sum(node.program is program for node in self.started)}

    @property
    def num_running(self) -> int:
        return len(self._tasks)

    async def _carry_out(self, node) -> None:
        try:
            await (self._tool(node) if isinstance(node, ToolNode) else self._call(node))
        except (Exception, asyncio.CancelledError) as error:
            node.output.fail(error)

    async def _call(self, node: CallNode) -> None:
        prompt = await node.render()
        if prompt.given:
            node.output.resolve(prompt.value)
            return
        lines = []
        for message in prompt.messages:
            parts = []
            for part in message.content:
                if not isinstance(part, str):
                    await part
                    part = part.value_text()
                parts.append(part)
            lines.append(f"{message.role}: {''.join(parts)}")
        text = "\n".join(lines)
        node.begin()
        check = OutputCheck(node, self._unenforced(node))
        for attempt in range(check.retries + 1):
            self.prompts.append(text)
            try:
                await self._generate(node, text, check)
                return
            except OutputError as error:
                if attempt == check.retries:
                    raise
                text += f"\nuser: not right: {error.reason}"

    def _unenforced(self, node: CallNode) -> list[str]:
        """What a grammar would leave open, as the pointers of `Grammar.unenforced`."""
        found = []
        for index, tool in enumerate(node.options.tools):
            spec = ToolSpec(tool.name, parameters=json.dumps(tool.parameters))
            found += [f"/tools/{index}/parameters{p}" for p in call_source(spec, closing=True).unenforced]
        if node.output_schema is not None:
            try:
                found += schema_source(json.dumps(node.output_schema), node.options.strict).unenforced
            except GrammarError as error:
                raise OutputTypeError(f"{node}: {error}") from error
        return found

    async def _generate(self, node: CallNode, text: str, check: OutputCheck) -> None:
        reply = self.model(text)
        if hasattr(reply, "__await__"):
            reply = await reply
        if isinstance(reply, Exception):
            raise reply
        reply = Reply(reply) if isinstance(reply, str) else reply
        for index, (name, arguments) in enumerate(reply.calls):
            node.on_tool_call(index, name, arguments, check.wrong_arguments(name, arguments))
        await asyncio.sleep(reply.seconds)
        if check.is_final and node.output_schema is None:
            for word in reply.text.split(" "):
                node.output.push(word if word == reply.text.split(" ")[0] else f" {word}", (len(word),))
                await asyncio.sleep(0)
        value = check.value(reply.text)
        node.output.resolve(value, tuple(len(word) for word in reply.text.split(" ")), reply.text)

    async def _tool(self, node: ToolNode) -> None:
        arguments = await node.ready_arguments()
        limit = node.tool.concurrency
        slots = self._slots.setdefault(node.tool, asyncio.Semaphore(limit)) if limit else contextlib.nullcontext()
        async with slots:
            node.begin()
            for attempt in range(node.tool.retries + 1):
                try:
                    node.output.resolve(await asyncio.wait_for(node.run(arguments), node.tool.timeout))
                    return
                except TimeoutError as error:
                    raise ToolTimeout(f"{node.tool.name} took longer than {node.tool.timeout} s") from error
                except Exception:
                    if attempt == node.tool.retries:
                        raise


async def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.001)
