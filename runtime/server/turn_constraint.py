"""What the grammar enforces in a turn: tool calls, an answer of a given form, or both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from treadle.grammar import Constraint, JSONSchema, ToolSpec, ToolTurn, constraint_to_json
from treadle.runtime.engine.session import Session
from treadle.runtime.errors import InvalidRequestError, OverloadedError
from treadle.runtime.server.errors import ApiError, invalid

if TYPE_CHECKING:
    from treadle.runtime.server.turn import TurnRequest

GRAMMAR_RETRY_S = 10.0
"""After which it makes sense to ask again for a grammar that took too long to compile."""


def callable_tools(request: TurnRequest) -> tuple[ToolSpec, ...]:
    """The tools that the model may call in this turn."""
    if request.tool_mode == "none":
        return ()
    allowed = request.callable_tools
    return tuple(tool for tool in request.tools if allowed is None or tool.name in allowed)


def turn_constraint(request: TurnRequest) -> Constraint | None:
    """What the text of a turn must be; None for free text."""
    tools = callable_tools(request)
    if not tools:
        return request.answer
    if request.tool_mode == "required":
        return ToolTurn(tools, "required", parallel=request.parallel)
    if request.answer is not None and not isinstance(request.answer, JSONSchema):
        raise invalid("beside tools, an answer can only be JSON", "response_format")
    return ToolTurn(tools, answer=request.answer, parallel=request.parallel)


async def prepared_constraint(session: Session, tenant: str, request: TurnRequest) -> str | None:
    """The constraint in the engine's words, compiled there for the tenant.

    Raises `ApiError` 400 for one that does not compile, and for a strict tool of whose schema something cannot be
    enforced; 503 where compiling takes too long: it goes on, and may be over when the client comes back.
    """
    constraint = turn_constraint(request)
    if constraint is None:
        return None
    try:
        try:
            unenforced = await session.prepare(constraint, tenant)
        except InvalidRequestError as error:
            param = await _at_fault(session, tenant, request)
            raise invalid(f"{param}: {error}", param, "invalid_schema") from None
    except OverloadedError as error:
        code, wait = "grammar_timeout", GRAMMAR_RETRY_S
        raise ApiError(503, str(error), type="server_error", code=code, retry_after=wait) from None
    for pointer in unenforced:
        _check_strict(request, pointer)
    return constraint_to_json(constraint)


async def _at_fault(session: Session, tenant: str, request: TurnRequest) -> str:
    """The field that does not compile: the first such tool, or else the answer, or the tools together.

    Tools were compiled in this order and are kept, so that only the first one at fault is compiled again.
    """
    tools = callable_tools(request)
    if not tools:
        return "response_format"
    for index, tool in enumerate(request.tools):
        if tool in tools and not await _compiles(session, tenant, ToolTurn((tool,))):
            return f"tools[{index}].function.parameters"
    answer = request.answer if request.tool_mode == "auto" else None
    if answer is not None and not await _compiles(session, tenant, answer):
        return "response_format"
    return "tools"


async def _compiles(session: Session, tenant: str, constraint: Constraint) -> bool:
    try:
        await session.prepare(constraint, tenant)
    except InvalidRequestError:
        return False
    return True


def _check_strict(request: TurnRequest, pointer: str) -> None:
    """`pointer` is `/tools/I/parameters/...`, I counting the tools that may be called, or `/answer/...`."""
    _, part, *rest = pointer.split("/")
    if part != "tools":
        return
    tool = callable_tools(request)[int(rest[0])]
    if tool.name in request.strict_tools:
        param = f"tools[{request.tools.index(tool)}].function.parameters"
        where = "/".join(["", *rest[2:]])
        text = f"{param}: {where} cannot be enforced while generating; remove it, or leave out strict"
        raise invalid(text, param, "unsupported_schema")
