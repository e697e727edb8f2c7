"""What clients tell of their programs: tools that begin and end, steps, the end. In any order, any number of times."""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator
from typing_extensions import TypedDict

from treadle.runtime.server.program import LiveProgram
from treadle.runtime.server.programs import Programs
from treadle.runtime.server.requests import RequestModel

MAX_EVENTS = 256
MAX_SEEN = 1024

EventStatus: TypeAlias = Literal["accepted", "duplicate", "late", "dropped"]
ShortText: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]


class ProgramEvent(RequestModel):
    """Something that happened to a program. What a type needs: `tool_start` a `call_id` and the tool's `name`,
    `tool_end` a `call_id`, `step` a `name`."""

    id: ShortText
    type: Literal["tool_start", "tool_end", "step", "end"]
    call_id: ShortText | None = None
    name: ShortText | None = None
    typical_s: Annotated[float, Field(gt=0, le=30 * 86400)] | None = None
    failed: bool = False

    @model_validator(mode="after")
    def _is_complete(self) -> ProgramEvent:
        if self.type in ("tool_start", "tool_end") and self.call_id is None:
            raise ValueError(f"a {self.type} event needs a call_id")
        if self.type in ("tool_start", "step") and self.name is None:
            raise ValueError(f"a {self.type} event needs a name")
        return self


class EventsRequest(RequestModel):
    """Events, in the order in which they happened if that is known."""

    events: Annotated[list[ProgramEvent], Field(min_length=1, max_length=MAX_EVENTS)]


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
    if event.type == "end":
        programs.end_soon(program, "ended by its owner")
    elif event.type == "step":
        program.step = event.name
        programs.tell(program, "step", {"name": event.name})
    elif event.type == "tool_start":
        return _tool_start(programs, program, event)
    elif event.call_id is not None:
        node = program.tools.get(event.call_id)
        if node is not None:
            programs.end_node(program, node, failed=event.failed)
        elif event.call_id in program.over_tools:
            return "late", "this tool has ended already"
        else:
            _remember(program.over_tools, event.call_id)
    return "accepted", None


def _tool_start(programs: Programs, program: LiveProgram, event: ProgramEvent) -> tuple[EventStatus, str | None]:
    assert event.call_id is not None and event.name is not None, "checked when it was read"
    if event.call_id in program.tools:
        return "accepted", "the turn that called it told of it before"
    if event.call_id in program.over_tools:
        return "late", "this tool has ended already"
    turns = (node.id for node in reversed(program.nodes.values()) if node.kind == "llm")
    inputs = tuple(turn for turn in (next(turns, None),) if turn is not None)
    node = programs.begin_tool(program, event.call_id, event.name, inputs, event.typical_s)
    return ("accepted", None) if node is not None else ("dropped", "the program has no room for more nodes")


def _remember(known: OrderedDict[str, None], name: str) -> None:
    known[name] = None
    if len(known) > MAX_SEEN:
        known.popitem(last=False)
