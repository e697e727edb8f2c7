"""`/v1/programs`: begin a program, look at it, tell what happens to it, hint at what it needs, end it.

All of it is of the tenant whose key asks: of another one's program it says what it says of one that never was.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Annotated, Any, Literal, TypeAlias

from aiohttp import web
from pydantic import Discriminator, Field
from typing_extensions import TypedDict

from treadle.runtime.errors import TreadleError
from treadle.runtime.server.answers import json_answer
from treadle.runtime.server.context import PROGRAM_ID, SERVER, TENANT, Server
from treadle.runtime.server.errors import RETRY_AFTER_S, ApiError, invalid, not_found
from treadle.runtime.server.graph_view import to_json, to_mermaid, to_svg
from treadle.runtime.server.identity import (
    MAX_DUE_S,
    MAX_ID_CHARACTERS,
    MAX_PRIORITY,
    PRINTABLE,
    THROUGHPUT_DUE_S,
    Identity,
    Objective,
)
from treadle.runtime.server.limits import read_json
from treadle.runtime.server.program import LiveProgram, NodeKind, NodeState, ProgramState
from treadle.runtime.server.program_events import EventAnswer, EventsRequest, ShortText, take_event
from treadle.runtime.server.program_report import report_of
from treadle.runtime.server.requests import Many, RequestModel, validated
from treadle.runtime.server.routes import Query, Route
from treadle.scheduler import Hint, HintAction, HintAnswered, HintOutcome

MAX_LISTED = 1000
INSPECT_S, HINT_S = 2.0, 10.0
"""How long the engine is waited for: one that begins anew has forgotten what it was asked."""
SVG_HEADERS = {"Content-Security-Policy": "default-src 'none'; sandbox", "X-Content-Type-Options": "nosniff"}

GraphFormat: TypeAlias = Literal["json", "mermaid", "svg"]
Seconds: TypeAlias = float


Name: TypeAlias = Annotated[str, Field(pattern=f"^{PRINTABLE.pattern}$", max_length=MAX_ID_CHARACTERS)]


class NewProgram(RequestModel):
    """A program to begin. Without an `id` it gets one; `kind` groups programs that behave alike."""

    id: Name | None = None
    kind: Name | None = None
    parent: ShortText | None = None
    step: ShortText | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    deadline_s: Annotated[float, Field(gt=0, le=MAX_DUE_S)] | None = None
    objective: Objective = "latency"


class Retain(RequestModel):
    """The program comes back within so many seconds: its pages are to be kept as if it came at once."""

    action: Literal["retain"]
    seconds: Annotated[float, Field(gt=0, le=MAX_DUE_S)]


class Demote(RequestModel):
    """The program comes back, but late: its pages are to go before those of others."""

    action: Literal["demote"]


class Release(RequestModel):
    """Nobody comes back to the conversations that the program has left."""

    action: Literal["release"]


Wish: TypeAlias = Annotated[Retain | Demote | Release, Discriminator("action")]


class HintsRequest(RequestModel):
    """Hints, answered one by one."""

    hints: Annotated[Many[Wish], Field(min_length=1, max_length=16)]


class WaitsFor(TypedDict):
    """A tool that runs."""

    tool: str
    call_id: str | None
    seconds: Seconds


class ProgramSummary(TypedDict):
    """A program in a few words. `source` is what named it, `idle_s` how long nothing was heard of it."""

    id: str
    object: Literal["program"]
    state: ProgramState
    source: str
    kind: str
    parent: str | None
    step: str | None
    priority: int
    created_at: float
    age_s: Seconds
    idle_s: Seconds
    turns: int
    nodes: int
    waits_for: list[WaitsFor]
    end_reason: str | None


class ProgramDetail(ProgramSummary):
    """A program in detail. `why` says in sentences what it waits for; `account` what it used so far."""

    account: dict[str, Any] | None
    calls: list[dict[str, Any]]
    leases: list[dict[str, Any]]
    leased_pages: int
    why: list[str]
    decisions: list[dict[str, Any]]


class ProgramList(TypedDict):
    """Programs; those used last come first."""

    object: Literal["list"]
    data: list[ProgramSummary]
    has_more: bool


class EndedProgram(TypedDict):
    """A program that has ended, with what it used."""

    id: str
    object: Literal["program"]
    deleted: Literal[True]
    account: dict[str, Any] | None


class EventAnswers(TypedDict):
    """What became of each event, in the order of the request."""

    object: Literal["list"]
    data: list[EventAnswer]


class HintAnswer(TypedDict):
    """What became of a hint: done for so many tokens that are computed, until then (seconds since 1970)."""

    action: HintAction
    outcome: HintOutcome
    tokens: int
    granted_s: Seconds | None
    granted_until: float | None
    reason: str | None


class HintAnswers(TypedDict):
    """What became of each hint, in the order of the request."""

    object: Literal["list"]
    data: list[HintAnswer]


class GraphNode(TypedDict):
    """A node. Times are seconds since the program was opened."""

    id: str
    kind: NodeKind
    name: str
    state: NodeState
    call_id: str | None
    began_s: Seconds
    ended_s: Seconds | None


class GraphEdge(TypedDict):
    """What a node needs: a value, a conversation that goes on, the turn that called a tool."""

    source: str
    target: str
    kind: Literal["value", "extends", "calls"]


class ProgramGraph(TypedDict):
    """All nodes and edges of a program."""

    id: str
    state: ProgramState
    age_s: Seconds
    nodes: list[GraphNode]
    edges: list[GraphEdge]


async def begin_program(request: web.Request) -> web.StreamResponse:
    """Begins a program."""
    server, tenant = request.app[SERVER], request[TENANT]
    body = await read_json(request, server.config)
    given = validated(body, NewProgram)
    if "graph" in body:
        raise invalid("graph: not supported: a program's graph grows with its requests and events", "graph")
    if given.id is not None and server.programs.find(tenant, given.id) is not None:
        raise ApiError(409, f"program {given.id!r} is live already", param="id", code="program_exists")
    if server.draining:
        raise ApiError(503, "the server ends; try another one", type="server_error", code="draining", retry_after=5.0)
    due_s = given.deadline_s
    if due_s is None and given.objective == "throughput":
        due_s = THROUGHPUT_DUE_S
    program = server.programs.open(
        tenant,
        Identity(
            given.id,
            "api",
            parent=given.parent,
            step=given.step,
            kind=given.kind,
            priority=given.priority,
            due_s=due_s,
        ),
    )
    program.step = given.step
    request[PROGRAM_ID] = program.public_id
    return json_answer(program.to_json(server.programs.now), 201)


async def list_programs(request: web.Request) -> web.StreamResponse:
    """The live programs of the tenant."""
    server = request.app[SERVER]
    limit = _limit(request)
    programs = list(server.programs.live(request[TENANT]))[::-1]
    shown = [program.to_json(server.programs.now) for program in programs[:limit]]
    return json_answer({"object": "list", "data": shown, "has_more": len(programs) > limit})


async def get_program(request: web.Request) -> web.StreamResponse:
    """A program in detail."""
    server, program = request.app[SERVER], _program(request, or_ended=True)
    inspected: dict[str, Any] = {}
    # What the server knows is worth telling without an engine too.
    with contextlib.suppress(TreadleError, TimeoutError):
        async with asyncio.timeout(INSPECT_S):
            if program.ended is None:
                inspected = (await server.session.inspect(program.id))["programs"].get(program.id, {})
            if program.ended is not None:
                await server.programs.end(program)  # its account may still be awaited
    return json_answer(report_of(program, inspected, server.programs.now))


async def end_program(request: web.Request) -> web.StreamResponse:
    """Ends a program and forgets it; its requests that run are aborted."""
    programs, program = request.app[SERVER].programs, _program(request, or_ended=True)
    account = await programs.end(program)
    programs.forget(program)
    used = account.to_json() if account is not None else None
    return json_answer({"id": program.public_id, "object": "program", "deleted": True, "account": used})


async def tell_events(request: web.Request) -> web.StreamResponse:
    """Takes events."""
    server, program = request.app[SERVER], _program(request, or_ended=True)
    given = validated(await read_json(request, server.config), EventsRequest)
    server.programs.heard(program)
    return json_answer(
        {"object": "list", "data": [take_event(server.programs, program, event) for event in given.events]}
    )


async def give_hints(request: web.Request) -> web.StreamResponse:
    """Answers hints."""
    server, program = request.app[SERVER], _program(request, or_ended=True)
    given = validated(await read_json(request, server.config), HintsRequest)
    answers = [_hint_answer(wish, await _ask(server, program, wish)) for wish in given.hints]
    for answer in answers:
        server.programs.heard(program, keep_s=answer["granted_s"] or 0.0)
        server.programs.tell(program, "hint", answer)
    return json_answer({"object": "list", "data": answers})


async def _ask(server: Server, program: LiveProgram, wish: Wish) -> HintAnswered:
    command = Hint(
        server.session.new_id("request"), program.id, wish.action, wish.seconds if isinstance(wish, Retain) else 0.0
    )
    if program.ended is not None:
        return HintAnswered(command.request_id, program.id, "dropped", 0, 0.0, "the program has ended")
    with contextlib.suppress(TimeoutError):
        if server.is_engine_there():
            async with asyncio.timeout(HINT_S):
                answer: HintAnswered = await server.session.ask(command)
                return answer
    text = "the engine does not answer; it may begin anew"
    raise ApiError(503, text, type="server_error", code="engine_unavailable", retry_after=RETRY_AFTER_S)


async def get_graph(request: web.Request) -> web.StreamResponse:
    """A program's graph, in one of three forms."""
    program, now = _program(request, or_ended=True), request.app[SERVER].programs.now
    match request.query.get("format", "json"):
        case "json":
            return json_answer(to_json(program, now))
        case "mermaid":
            return web.Response(text=to_mermaid(program, now), content_type="text/plain")
        case "svg":
            return web.Response(text=to_svg(program, now), content_type="image/svg+xml", headers=SVG_HEADERS)
    raise invalid("format: give json, mermaid or svg", "format")


def _program(request: web.Request, *, or_ended: bool = False) -> LiveProgram:
    """The tenant's program that the address names."""
    programs, tenant, public_id = request.app[SERVER].programs, request[TENANT], request.match_info["program_id"]
    program = programs.find(tenant, public_id)
    if program is None and or_ended:
        program = programs.find_ended(tenant, public_id)
    if program is None:
        raise not_found(
            f"there is no program {public_id[:256]!r}; it may have ended", "program_id", "program_not_found"
        )
    request[PROGRAM_ID] = program.public_id
    return program


def _limit(request: web.Request) -> int:
    given = request.query.get("limit", "100")
    if not given.isascii() or not given.isdecimal() or len(given) > 4 or not 1 <= int(given) <= MAX_LISTED:
        raise invalid(f"limit: give a number from 1 to {MAX_LISTED}", "limit")
    return int(given)


def _hint_answer(wish: Wish, answer: HintAnswered) -> HintAnswer:
    return {
        "action": wish.action,
        "outcome": answer.outcome,
        "tokens": answer.num_tokens,
        "granted_s": answer.seconds or None,
        "granted_until": round(time.time() + answer.seconds, 3) if answer.seconds else None,
        "reason": answer.reason or None,
    }


PATH = "/v1/programs/{program_id}"
LIMIT = Query("limit", Annotated[int, Field(ge=1, le=MAX_LISTED)], "How many to list, at most")
FORMAT = Query("format", GraphFormat, "The form of the graph: JSON, a flowchart in Mermaid's language, or a drawing")
ROUTES = (
    Route(
        "POST",
        "/v1/programs",
        begin_program,
        "Begin a program",
        body=NewProgram,
        answer=ProgramSummary,
        status=201,
        errors=(409, 429, 503),
    ),
    Route("GET", "/v1/programs", list_programs, "The live programs", answer=ProgramList, query=(LIMIT,)),
    Route("GET", PATH, get_program, "A program, and why it waits", answer=ProgramDetail, errors=(404,)),
    Route("DELETE", PATH, end_program, "End a program", answer=EndedProgram, errors=(404,)),
    Route(
        "POST",
        f"{PATH}/events",
        tell_events,
        "Tell what happens to a program",
        body=EventsRequest,
        answer=EventAnswers,
        errors=(404,),
    ),
    Route(
        "POST",
        f"{PATH}/hints",
        give_hints,
        "Hint at what a program needs",
        body=HintsRequest,
        answer=HintAnswers,
        errors=(404, 503),
    ),
    Route(
        "GET",
        f"{PATH}/graph",
        get_graph,
        "A program's graph",
        answer=ProgramGraph,
        media_types=("text/plain", "image/svg+xml"),
        errors=(404,),
        query=(FORMAT,),
    ),
)
