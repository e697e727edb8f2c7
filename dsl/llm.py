"""`@llm`: typed functions that a model carries out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, Concatenate, Generic, ParamSpec, TypedDict, TypeVar, Unpack, overload

from treadle.dsl.body import Body
from treadle.dsl.compile import TracingBackend
from treadle.dsl.duration import Duration, seconds
from treadle.dsl.errors import DSLError
from treadle.dsl.hints import bind, local_names, type_hints
from treadle.dsl.location import caller
from treadle.dsl.node import CallNode, LLMOptions
from treadle.dsl.program import Program, program_for
from treadle.dsl.prompt import Message
from treadle.dsl.samples import Samples
from treadle.dsl.schema import OutputType, output_type
from treadle.dsl.var import Var
from treadle.dsl.varlist import VarList, find_vars

P = ParamSpec("P")
Q = ParamSpec("Q")
T = TypeVar("T")
X = TypeVar("X")


class TurnOptions(TypedDict, total=False):
    """The options of a `Chat`; `LLMOptions` says what each means."""

    model: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: str | Sequence[str]
    retries: int | None
    timeout: Duration | None
    strict: bool


class CallOptions(TurnOptions, total=False):
    """The options of `@llm` and of `fn.using`."""

    system: str | None


def with_options(options: LLMOptions, changes: CallOptions | TurnOptions) -> LLMOptions:
    """Options with changes. Raises `DSLError` for one that there is not."""
    values: dict[str, Any] = dict(changes)
    unknown = ", ".join(sorted(set(values) - set(CallOptions.__annotations__)))
    if unknown:
        raise DSLError(f"{caller()}: no such option: {unknown}; there are {', '.join(CallOptions.__annotations__)}")
    if "stop" in values:
        values["stop"] = (values["stop"],) if isinstance(values["stop"], str) else tuple(values["stop"])
    if values.get("timeout") is not None:
        values["timeout"] = seconds(values["timeout"])
    for name, least in (("retries", 0), ("max_tokens", 1)):
        if values.get(name) is not None and values[name] < least:
            raise DSLError(f"{caller()}: {name} is {values[name]}; it must be at least {least}")
    return replace(options, **values)


class LLMFunction(Generic[P, T]):
    """A typed function that a model carries out. Made by `@llm`.

    Calling it adds a call to the program and returns its value as a variable, at once.
    """

    def __init__(self, fn: Callable[P, Coroutine[Any, Any, T]], options: LLMOptions) -> None:
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.name = fn.__name__
        self.options = options
        self._names = local_names(fn)
        self._signature = inspect.signature(fn)
        self._where = f"{self.name} ({fn.__code__.co_filename}:{fn.__code__.co_firstlineno})"
        if not inspect.iscoroutinefunction(fn):
            raise DSLError(f"{self._where}: write `async def {self.name}` under @llm")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Var[T]:
        """Adds a call to the program. Raises `TypeError` for arguments that the function does not have.

        Outside of any `program` the call is a program of its own; without a backend it is a `NoBackendError`.
        """
        arguments = self._bind(*args, **kwargs)
        program = program_for(self.name, find_vars(arguments.arguments))
        return self._call(arguments, program, self._body(arguments))

    def using(self, **changes: Unpack[CallOptions]) -> LLMFunction[P, T]:
        """The same function with other options: `review.using(temperature=0)`."""
        copy: LLMFunction[P, T] = LLMFunction(self.fn, with_options(self.options, changes))
        copy._names = self._names
        return copy

    async def preview(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Runs the body and returns the prompt as text, without calling the model; needs no backend.

        A variable without a value is shown as the name of its function, in angle brackets.
        """
        arguments = self._bind(*args, **kwargs)
        outer = next((var.program for var in find_vars(arguments.arguments)), None)
        program = Program(self.name, TracingBackend(self.name), parent=outer)
        await program.open()
        prompt = await self._body(arguments).run(program)
        if prompt.given:
            return f"(no prompt: the body returned {prompt.value!r})"
        return "\n\n".join(f"{message.role}:\n{_shown(message)}" for message in prompt.messages)

    def map(
        self: LLMFunction[Concatenate[X, Q], T], items: Iterable[X], /, *args: Q.args, **kwargs: Q.kwargs
    ) -> VarList[T]:
        """One call for each item, which is the first argument; the other arguments are the same for all.

        ::

            answers = await answer.map(questions, style="brief")
        """
        calls = [self._bind(item, *args, **kwargs) for item in items]
        program = program_for(self.name, find_vars([call.arguments for call in calls]))
        group = program.new_group_id()
        return VarList(
            [self._call(call, program, self._body(call), group=group, sample=i) for i, call in enumerate(calls)]
        )

    def n(self, count: int) -> Sampler[P, T]:
        """Several samples of one prompt, which is computed once: `write.n(3)(topic)`. See `Samples`."""
        if count < 1:
            raise DSLError(f"{caller()}: n({count}); there is at least 1 sample")
        return Sampler(self, count)

    def __repr__(self) -> str:
        return f"<llm {self._where}>"

    @functools.cached_property
    def output(self) -> OutputType:
        """The declared type of the result. Raises `OutputTypeError` for one that a model cannot write."""
        hints = type_hints(self.fn, self._names)
        if "return" not in hints:
            raise DSLError(f"{self._where}: annotate what {self.name} returns; it is what the model must write")
        return output_type(hints["return"], self._where)

    def _bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        return bind(self.name, self._signature, args, kwargs)

    def _body(self, arguments: inspect.BoundArguments) -> Body:
        return Body(self.fn, arguments, self.output, self.options.system, self._where)

    def _call(
        self,
        arguments: inspect.BoundArguments,
        program: Program,
        body: Body,
        *,
        group: str | None = None,
        sample: int | None = None,
        fork_of: CallNode | None = None,
    ) -> Var[T]:
        options = self.options
        if fork_of is not None and sample and options.seed is not None:
            options = replace(options, seed=options.seed + sample)
        node = CallNode(
            program,
            self.name,
            find_vars(arguments.arguments),
            body,
            self.output,
            options,
            group=group,
            sample=sample,
            fork_of=fork_of,
        )
        program.declare(node)
        return node.output


class Sampler(Generic[P, T]):
    """`fn.n(count)`: called as the function is."""

    def __init__(self, function: LLMFunction[P, T], count: int) -> None:
        self._function = function
        self._count = count

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Samples[T]:
        """Adds the calls to the program; the first is the one that the others fork."""
        function = self._function
        arguments = function._bind(*args, **kwargs)
        program = program_for(function.name, find_vars(arguments.arguments))
        body, group = function._body(arguments), program.new_group_id()
        first = function._call(arguments, program, body, group=group, sample=0)
        assert isinstance(first.node, CallNode)
        rest = [
            function._call(arguments, program, body, group=group, sample=index, fork_of=first.node)
            for index in range(1, self._count)
        ]
        return Samples([first, *rest])


class LLMDecorator:
    """`@llm(...)` with its options given."""

    def __init__(self, options: LLMOptions) -> None:
        self._options = options

    def __call__(self, fn: Callable[P, Coroutine[Any, Any, T]], /) -> LLMFunction[P, T]:
        return LLMFunction(fn, self._options)


@overload
def llm(fn: Callable[P, Coroutine[Any, Any, T]], /) -> LLMFunction[P, T]: ...
@overload
def llm(**options: Unpack[CallOptions]) -> LLMDecorator: ...
def llm(
    fn: Callable[P, Coroutine[Any, Any, T]] | None = None, /, **options: Unpack[CallOptions]
) -> LLMFunction[P, T] | LLMDecorator:
    """Makes a typed async function a call of a model.

    ::

        class Review(BaseModel):
            score: float
            fix: str

        @llm(max_tokens=200, temperature=0)
        async def review(draft: In[str]) -> Review:
            return prompt(f"Review this draft.\\n\\n{draft}")

        verdict = await review(write("looms"))

    Its parameters are the inputs; `In[T]` takes a value or a variable. Its return annotation is what the model must
    write: text, a pydantic model, a number, a `Literal` or an enum, a list or dict of these. Its body builds the prompt
    and may await what it needs. If it returns a value of the result type instead of a `prompt(...)`, the model is not
    called.

    Options: `model`, `max_tokens`, `temperature`, `top_p`, `seed`, `system`, `stop`, `retries`, `timeout`, `strict`;
    see `LLMOptions`.
    """
    decorator = LLMDecorator(with_options(LLMOptions(), options))
    return decorator if fn is None else decorator(fn)


def _shown(message: Message) -> str:
    parts = []
    for segment in message.content:
        if isinstance(segment, str):
            parts.append(segment)
        else:
            parts.append(segment.value_text() if segment.is_done else f"<{segment.node.name}>")
    return "".join(parts)
