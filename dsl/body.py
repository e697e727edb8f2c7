"""The body of an `@llm` function, with its arguments, run when its prompt is needed."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

from treadle.dsl.errors import PromptError
from treadle.dsl.holes import RENDERING, rendering_of
from treadle.dsl.node import CallNode
from treadle.dsl.program import PROGRAM, Program
from treadle.dsl.prompt import Draft, Message, Prompt
from treadle.dsl.schema import OutputType
from treadle.dsl.var import Var


class Body:
    """Runs once, however many samples ask for the prompt; again, if it failed or was cancelled."""

    def __init__(
        self,
        fn: Callable[..., Coroutine[Any, Any, Any]],
        arguments: inspect.BoundArguments,
        output: OutputType,
        system: str | None,
        where: str,
    ) -> None:
        self._fn = fn
        self._arguments = arguments
        self._output = output
        self._system = system
        self._where = where
        self._prompt: Prompt | None = None
        self._running = asyncio.Lock()

    async def __call__(self, node: CallNode) -> Prompt:
        async with self._running:
            if self._prompt is None:
                self._prompt = await self.run(node.program)
            return self._prompt

    async def run(self, program: Program) -> Prompt:
        """The prompt, whose holes may be variables of `program`; calls that the body makes join it."""
        rendering = rendering_of(program)
        program_token, rendering_token = PROGRAM.set(program), RENDERING.set(rendering)
        try:
            result = await self._fn(*self._arguments.args, **self._arguments.kwargs)
            if isinstance(result, Draft):
                return Prompt(self._with_system(result.messages))
            if isinstance(result, Var) or (isinstance(result, str) and rendering.split(result) not in ((), (result,))):
                raise PromptError(
                    f"{self._where}: the body returned a variable as its result: "
                    'write `return prompt(f"...")` to ask the model, or await the variable to return its value'
                )
            return Prompt(given=True, value=self._output.check(result))
        finally:
            RENDERING.reset(rendering_token)
            PROGRAM.reset(program_token)

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if self._system is None or any(message.role == "system" for message in messages):
            return messages
        return (Message("system", (self._system,)), *messages)
