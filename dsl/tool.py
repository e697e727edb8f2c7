"""Tools: functions that a workflow, or a model, can call."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeAlias, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from treadle.dsl.docstring import parameter_summaries, summary
from treadle.dsl.duration import Duration, seconds
from treadle.dsl.errors import DSLError, ToolArgumentsError, ToolError
from treadle.dsl.hints import bind, local_names, type_hints
from treadle.dsl.holes import RENDERING, refuse_holes
from treadle.dsl.location import caller
from treadle.dsl.node import ToolNode
from treadle.dsl.program import PROGRAM, program_for
from treadle.dsl.schema import PlainSchema, explain, plain_schema, without_vars
from treadle.dsl.varlist import find_vars

if TYPE_CHECKING:
    from treadle.dsl.program import Program
    from treadle.dsl.var import Var

P = ParamSpec("P")
T = TypeVar("T")
Effects: TypeAlias = Literal["read", "idempotent", "once"]


class Tool(Generic[P, T]):
    """A function that runs as a node of the program's graph. Made by `@tool`.

    Calling it gives a `Var[T]` at once, in a program or as one of its own; `tool.fn` is the plain function.

    Attributes:
        fn: The plain function.
        name: Of the function.
        description: The first paragraph of its docstring.
        parameters: JSON Schema of its arguments.
        typical: Seconds that it usually takes, if known.
        timeout: Seconds after which it is given up.
        retries: How often it is run again after an error.
        effects: `read` changes nothing, `idempotent` may run twice, `once` may not.
        concurrency: Most runs at a time.
    """

    def __init__(
        self,
        fn: Callable[P, Any],
        *,
        name: str | None,
        typical: float | None,
        timeout: float | None,
        retries: int,
        effects: Effects,
        concurrency: int | None,
    ) -> None:
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.name = name or fn.__name__
        self.description = summary(fn.__doc__)
        self.typical = typical
        self.timeout = timeout
        self.retries = retries
        self.effects = effects
        self.concurrency = concurrency
        self._names = local_names(fn)
        self._signature = inspect.signature(fn)
        for parameter in self._signature.parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise DSLError(f"{caller()}: tool {self.name!r}: give the parameter {parameter} a plain name")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Var[T]:
        """Adds a run of the tool to the program and returns its result as a variable.

        Raises `TypeError` for arguments that the function does not have, `NoBackendError` where nothing runs programs.
        """
        arguments = bind(self.name, self._signature, args, kwargs).arguments
        for argument in arguments.values():
            refuse_holes(argument)
        inputs = list(find_vars(arguments))
        program = program_for(self.name, inputs)
        node = ToolNode(program, self, arguments, inputs)
        program.declare(node)
        return node.output

    def __repr__(self) -> str:
        return f"<Tool {self.name}>"

    @functools.cached_property
    def parameters(self) -> dict[str, Any]:
        schema = plain_schema(self._model.model_json_schema(by_alias=True, schema_generator=PlainSchema))
        return {"type": "object", "properties": {}, **schema}

    def validate(self, arguments: str | Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name, defaults included, from JSON text or plain values.

        Raises `ToolArgumentsError`, whose text tells a model what to change.
        """
        try:
            if isinstance(arguments, str):
                model = self._model.model_validate_json(arguments or "{}")
            else:
                model = self._model.model_validate(dict(arguments))
        except ValidationError as error:
            raise ToolArgumentsError(f"wrong arguments for {self.name}: {explain(error)}") from error
        return {field.alias or name: getattr(model, name) for name, field in type(model).model_fields.items()}

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """As `validate`, for values that come from the workflow."""
        return self.validate(arguments)

    async def run(
        self,
        arguments: Mapping[str, Any],
        program: Program | None = None,
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]] = asyncio.to_thread,
    ) -> T:
        """Runs the function once; one that is not async runs `in_thread`. Calls that it makes join `program`.

        Raises `ToolError` with what it raised as the cause.
        """
        program_token, rendering_token = PROGRAM.set(program), RENDERING.set(None)
        try:
            if inspect.iscoroutinefunction(self.fn):
                result = await self.fn(**arguments)  # type: ignore[call-arg]
            else:
                result = await in_thread(functools.partial(self.fn, **arguments))
                if inspect.isawaitable(result):
                    result = await result
        except ToolError:
            raise
        except Exception as error:
            raise ToolError(f"{self.name} failed: {type(error).__name__}: {error}") from error
        finally:
            PROGRAM.reset(program_token)
            RENDERING.reset(rendering_token)
        return result  # type: ignore[no-any-return]

    @functools.cached_property
    def _model(self) -> type[BaseModel]:
        hints = type_hints(self.fn, self._names)
        described = parameter_summaries(self.fn.__doc__)
        fields: dict[str, Any] = {}
        for index, parameter in enumerate(self._signature.parameters.values()):
            default = ... if parameter.default is parameter.empty else parameter.default
            annotation = without_vars(hints.get(parameter.name, Any))
            field = Field(default, alias=parameter.name, description=described.get(parameter.name))
            fields[f"field_{index}"] = (annotation, field)
        return create_model(self.name, __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)


@overload
def tool(fn: Callable[P, Coroutine[Any, Any, T]], /) -> Tool[P, T]: ...
@overload
def tool(fn: Callable[P, T], /) -> Tool[P, T]: ...
@overload
def tool(
    *,
    name: str | None = None,
    typical: Duration | None = None,
    timeout: Duration | None = None,
    retries: int = 0,
    effects: Effects = "once",
    concurrency: int | None = None,
) -> ToolDecorator: ...
def tool(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    typical: Duration | None = None,
    timeout: Duration | None = None,
    retries: int = 0,
    effects: Effects = "once",
    concurrency: int | None = None,
) -> Tool[..., Any] | ToolDecorator:
    """Makes a tool of a function, async or not. Its parameters are described by its type hints and its docstring.

    ::

        @tool(typical="2s", timeout=10, effects="read")
        async def search(query: str, limit: Annotated[int, Field(ge=1, le=20)] = 5) -> list[str]:
            \"\"\"Search the index.

            Args:
                query: What to look for.
                limit: Most results to return.
            \"\"\"

    Args:
        name: Instead of the function's.
        typical: How long it usually takes; the scheduler plans with it.
        timeout: How long it may take.
        retries: How often to run it again after an error. Not for `effects="once"`.
        effects: `read` changes nothing; `idempotent` may safely run twice; `once` may not, and when a model calls it,
            it does not start before the model's turn is complete.
        concurrency: Most runs at a time.
    """
    if retries and effects == "once":
        raise DSLError(f'{caller()}: a tool with retries runs more than once: say effects="read" or "idempotent"')
    decorator = ToolDecorator(
        name=name,
        typical=None if typical is None else seconds(typical),
        timeout=None if timeout is None else seconds(timeout),
        retries=retries,
        effects=effects,
        concurrency=concurrency,
    )
    return decorator if fn is None else decorator(fn)


class ToolDecorator:
    """`@tool(...)` with its options given."""

    def __init__(self, **options: Any) -> None:
        self._options = options

    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, T]], /) -> Tool[P, T]: ...
    @overload
    def __call__(self, fn: Callable[P, T], /) -> Tool[P, T]: ...
    def __call__(self, fn: Callable[..., Any], /) -> Tool[..., Any]:
        return Tool(fn, **self._options)
