"""What clients tell of their programs: tools that begin and end, steps, the end. In any order, any number of times."""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, Literal, TypeAlias

from pydantic import Discriminator, Field
from typing_extensions import TypedDict

from treadle.runtime.server.program import LiveProgram
from treadle.runtime.server.programs import Programs
from treadle.runtime.server.requests import Many, RequestModel

MAX_EVENTS = 256
MAX_SEEN = 1024

EventStatus: TypeAlias = Literal["accepted", "duplicate", "late", "dropped"]
ShortText: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]


class ToolStart(RequestModel):
    """A tool runs from now on. `typical_s` says how long that usually takes, until it is known."""

    id: ShortText
    type: Literal["tool_start"]
    call_id: ShortText
    name: ShortText
    typical_s: Annotated[float, Field(gt=0, le=30 * 86400)] | None = None


class ToolEnd(RequestModel):
    """A tool has ended."""

    id: ShortText
    type: Literal["tool_end"]
    call_id: ShortText
    failed: bool = False


class Step(RequestModel):
    """What the turns that follow are called."""

    id: ShortText
    type: Literal["step"]
    name: ShortText


class ProgramEnd(RequestModel):
    """The program is over."""

    id: ShortText
    type: Literal["end"]


ProgramEvent: TypeAlias = Annotated[ToolStart | ToolEnd | Step | ProgramEnd, Discriminator("type")]


class EventsRequest(RequestModel):
    """Events, in the order in which they happened if that is known."""

    events: Annotated[Many[ProgramEvent], Field(min_length=1, max_length=MAX_EVENTS)]


class EventAnswer(TypedDict):
    """What became of an event. `duplicate`: its id was seen before; `late`: what happened after it is known already;
    `dropped`: there is no room for it."""

    id: str
    status: EventStatus
    reason: str | None


def take_event(programs: Programs, program: LiveProgram, event: ProgramEvent) -> EventAnswer:
    """Does what an event tells, once."""
    if event.id in program.seen_events:
        return {"id": event.id, "status": "duplicate", "reason": None}
    _remember(program.seen_events, event.id)
    if program.ended is not None:
        return {"id": event.id, "status": "late", "reason": "the program has ended"}
    status, reason = _done(programs, program, event)
    return {"id": event.id, "status": status, "reason": reason}


def _done(programs: Programs, program: LiveProgram, event: ProgramEvent) -> tuple[EventStatus, str | None]:
    match event:
        case ToolStart():
            return _start(programs, program, event)
        case ToolEnd():
            node = program.tools.get(event.call_id)
            if node is not None:
                programs.end_node(program, node, failed=event.failed)
            elif event.call_id in program.over_tools:
                return "late", "this tool has ended already"
            else:
                _remember(program.over_tools, event.call_id)
        case Step():
            program.step = event.name
            programs.tell(program, "step", {"name": event.name})
        case ProgramEnd():
            programs.end_soon(program, "ended by its owner")
    return "accepted", None


def _start(programs: Programs, program: LiveProgram, event: ToolStart) -> tuple[EventStatus, str | None]:
    if event.call_id in program.tools:
        return "accepted", "the turn that called it told of it before"
    if event.call_id in program.over_tools:
        return "late", "this tool has ended already"
    last_turn = next((node.id for node in reversed(program.nodes.values()) if node.kind == "llm"), None)
    inputs = (last_turn,) if last_turn is not None else ()
    node = programs.begin_tool(program, event.call_id, event.name, inputs, event.typical_s)
    return ("accepted", None) if node is not None else ("dropped", "the program has no room for more nodes")


def _remember(known: OrderedDict[str, None], name: str) -> None:
    known[name] = None
    if len(known) > MAX_SEEN:
        known.popitem(last=False)
