"""What an engine was told and what it answered: enough to have another one go on where it died.

Kept is what is still open: programs with their graphs, calls with their prompts and what they generated, requests that
wait for an answer. Whoever ended is forgotten. An id that is used again names the latest of its owners for commands,
and the earliest that has not ended for events, as the engine answers in order.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar

from treadle.scheduler import (
    AbortCall,
    AppendPrompt,
    CallFinished,
    Command,
    DeclareNode,
    EndProgram,
    Event,
    Hint,
    HintAnswered,
    Inspect,
    Inspected,
    OpenProgram,
    Prepare,
    Prepared,
    ProgramEnded,
    Rejected,
    Resume,
    SubmitCall,
    TokensOut,
    Wait,
    Watch,
)
from treadle.scheduler.call import Tally
from treadle.scheduler.config import MAX_NODES
from treadle.scheduler.graph import ProgramGraph

T = TypeVar("T")
DIED_OVER_IT = "the engine died twice while it compiled this grammar; use another one"
_Request: TypeAlias = Prepare | Inspect | Hint


@dataclass(slots=True, eq=False)
class _Program:
    """A program that was opened, or one that was only ended.

    `again` are attempts to open it while it was open, which the engine answers one by one. `survived` says that it has
    outlived an engine.
    """

    opened: OpenProgram | None
    graph: ProgramGraph
    again: list[OpenProgram] = field(default_factory=list)
    num_calls: int = 0
    tally: Tally = field(default_factory=Tally)
    ended: bool = False
    survived: bool = False

    def commands(self, now: float) -> Iterator[Command]:
        """Opens it, and tells its graph as far as it has come."""
        if self.opened is None:
            return
        yield replace(self.opened, due_s=self.opened.due_s - (now - self.graph.opened))
        yield from self.again
        outside = self.graph.outside(now)
        for node in self.graph.nodes():
            yield node
            if node.node_id in outside:
                yield Wait(node.program_id, node.node_id, outside[node.node_id])
            elif self.graph.has_ended(node.node_id):
                yield Resume(node.program_id, node.node_id)

    def account(self, event: ProgramEnded, now: float) -> ProgramEnded:
        """The last event of a program, with what happened before the engine that it comes from."""
        return replace(
            event,
            calls=self.num_calls,
            usage=self.tally.usage(),
            duration_s=now - self.graph.opened,
            tool_wait_s=self.graph.tool_wait_s,
            critical_path=self.graph.critical_path(),
        )


@dataclass(slots=True, eq=False)
class _Call:
    command: SubmitCall
    program: _Program | None
    prompt: array[int]
    open: bool
    generated: array[int] = field(default_factory=lambda: array("i"))
    aborted: bool = False

    def commands(self) -> Iterator[Command]:
        """Submits it again, with what it has generated.

        A fork becomes a call of its own: its parent may have ended, and what is shared is found in the prefix tree.
        """
        yield replace(
            self.command,
            token_ids=self.prompt + self.generated,
            open=self.open,
            fork_of=None,
            num_generated=len(self.generated),
        )
        if self.aborted:
            yield AbortCall(self.command.call_id)


class Journal:
    """Notes commands and events. `replay` gives the commands that bring a new engine to where they led."""

    def __init__(self) -> None:
        self._programs: defaultdict[str, list[_Program]] = defaultdict(list)
        self._calls: defaultdict[str, list[_Call]] = defaultdict(list)
        self._requests: dict[str, _Request] = {}
        self._suspects: set[str] = set()
        self._watched = False

    @property
    def num_calls(self) -> int:
        """Calls that have not ended."""
        return sum(map(len, self._calls.values()))

    def sent(self, command: Command, now: float) -> None:
        """Notes a command, in the order in which they reach the engine."""
        match command:
            case OpenProgram():
                program = self._program(command.program_id)
                if program is None:
                    self._programs[command.program_id].append(_Program(command, ProgramGraph(now)))
                else:
                    program.again.append(command)
            case EndProgram():
                program = self._program(command.program_id)
                if program is None:
                    program = _Program(None, ProgramGraph(now))
                    self._programs[command.program_id].append(program)
                program.ended = True
            case DeclareNode():
                self._declared(command)
            case Wait() | Resume():
                self._waited(command, now)
            case SubmitCall():
                program = self._program(command.program_id)
                call = _Call(command, program, array("i", command.token_ids), command.open)
                self._calls[command.call_id].append(call)
            case AppendPrompt() if command.call_id in self._calls:
                call = self._calls[command.call_id][-1]
                if call.open:
                    call.prompt.extend(command.token_ids)
                    call.open = not command.close
            case AbortCall() if command.call_id in self._calls:
                self._calls[command.call_id][-1].aborted = True
            case Watch():
                self._watched = command.on
            case Prepare() | Inspect() | Hint():
                self._requests[command.request_id] = command

    def _program(self, program_id: str) -> _Program | None:
        """The open program of that id."""
        found = self._programs.get(program_id)
        return found[-1] if found and not found[-1].ended else None

    def _declared(self, command: DeclareNode) -> None:
        program = self._program(command.program_id)
        if program is None or len(program.graph) >= MAX_NODES:
            return
        if all(needed in program.graph for needed in (*command.inputs, *filter(None, (command.extends,)))):
            program.graph.declare(command)

    def _waited(self, command: Wait | Resume, now: float) -> None:
        program = self._program(command.program_id)
        if program is None or command.node_id not in program.graph:
            return
        if isinstance(command, Wait):
            program.graph.began(command.node_id, now - command.ago_s)
        else:
            program.graph.ended(command.node_id, now)

    def came(self, event: Event, now: float) -> Event:
        """Notes an event. Returns it, or what it says once the life before its engine is added."""
        match event:
            case TokensOut() if event.call_id in self._calls:
                self._calls[event.call_id][0].generated.extend(event.token_ids)
            case CallFinished() if event.call_id in self._calls:
                self._finished(_take(self._calls, event.call_id), event, now)
            case ProgramEnded() if event.program_id in self._programs:
                program = _take(self._programs, event.program_id)
                return program.account(event, now) if program.survived else event
            case Rejected() if event.subject in self._requests:
                del self._requests[event.subject]
            case Rejected():
                self._rejected(event)
            case Prepared() | Inspected() | HintAnswered():
                self._requests.pop(event.request_id, None)
        return event

    def died(self) -> list[Event]:
        """Notes that the engine died. Answers for grammars that were compiled in two that did: no third one is to."""
        pending = [name for name, request in self._requests.items() if isinstance(request, Prepare)]
        answers: list[Event] = [Prepared(name, error=DIED_OVER_IT) for name in pending if name in self._suspects]
        for name in self._suspects.intersection(pending):
            del self._requests[name]
        self._suspects = set(pending) & self._requests.keys()
        return answers

    def _finished(self, call: _Call, event: CallFinished, now: float) -> None:
        program, node_id = call.program, call.command.node_id
        if program is None or event.error not in (None, "engine"):
            return
        program.num_calls += 1
        program.tally.add(Tally.of(event.usage))
        if node_id is not None and node_id in program.graph:
            program.graph.ended(node_id, now)

    def _rejected(self, event: Rejected) -> None:
        """Forgets what the engine would not have: a program or a call that is not opened, or not there to be ended."""
        name = event.subject
        if name in self._programs:
            owners = self._programs[name]
            if event.error in ("duplicate_id", "bad_deadline", "overloaded"):
                again = next((program.again for program in owners if program.again), None)
                if again is not None:
                    again.pop(0)
                else:
                    _take(self._programs, name, -1)
            elif event.error == "unknown_program" and owners[0].opened is None:
                _take(self._programs, name)
        elif name in self._calls and event.error in ("duplicate_id", "bad_sampling", "bad_constraint"):
            _take(self._calls, name, -1)

    def replay(self, now: float) -> list[Command]:
        """What to tell a new engine first."""
        commands: list[Command] = [Watch(True)] if self._watched else []
        programs = [program for owners in self._programs.values() for program in owners]
        calls = [call for owners in self._calls.values() for call in owners]
        for program in programs:
            program.survived = True
        for program_id, owners in self._programs.items():
            for program in owners:
                commands += program.commands(now)
                if program.ended:
                    for call in calls:
                        if call.program is program:
                            commands += call.commands()
                    commands.append(EndProgram(program_id))
        for call in calls:
            if call.program is None or not call.program.ended:
                commands += call.commands()
        return [*commands, *self._requests.values()]


def _take(owners: dict[str, list[T]], name: str, index: int = 0) -> T:
    """Takes one of the owners of an id away, the first unless told otherwise."""
    owner = owners[name].pop(index)
    if not owners[name]:
        del owners[name]
    return owner
