"""Records what programs do on an engine, as a trace that `treadle simulate` reads.

    session  --commands-->  RecordedEngine  --commands-->  engine
             <---events---                  <---events---
                                  |
                              Recorder  --one line for each program that ends-->  file

A line has no text and no token ids. Blocks of prompts are hashed with a key that is never written, each together with
all before it, and named by the number of hashes that were seen first. So prompts that begin alike have the same first
numbers, and nothing else can be told from them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import secrets
import time
import warnings
from array import array
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.runtime.errors import InvalidRequestError
from treadle.scheduler import (
    AppendPrompt,
    CallFinished,
    Command,
    DeclareNode,
    Event,
    OpenProgram,
    ProgramEnded,
    Rejected,
    Resume,
    SubmitCall,
)
from treadle.scheduler.simulator.traces.recorded import BLOCK_TOKENS

if TYPE_CHECKING:
    from treadle.runtime.engine.client import EngineClient

MAX_BLOCKS = 2**18
MAX_NODES = 2**14
MAX_CALLS = 2**10
PAUSES = ("tool", "person", "agent")


class RecordedEngine:
    """An engine client whose commands and events are told to a recorder, and are otherwise as they were."""

    def __init__(self, client: EngineClient, recorder: Recorder) -> None:
        self._client = client
        self._recorder = recorder

    def send(self, commands: Sequence[Command]) -> None:
        self._recorder.see(commands)
        self._client.send(commands)

    async def events(self) -> AsyncIterator[tuple[Event, ...]]:
        async for batch in self._client.events():
            self._recorder.see(batch)
            yield batch


class Recorder:
    """Appends a line to a file for each program that ends, with those of its calls that finished.

    Of a program its first 1,024 calls are recorded. What was not seen for 262,144 other blocks of prompts is new when
    it comes again. If anything goes wrong there is a warning, and no more is recorded.

    Attributes:
        separate: Programs whose calls have nothing to do with each other, by id: each is recorded as a program of its
            own, together with its forks.

    Raises:
        InvalidRequestError: the file cannot be written.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.separate: set[str] = set()
        self._path = Path(path).absolute()
        self._clock = clock
        self._began: float | None = None
        self._name = secrets.token_hex(8)
        self._blocks = _BlockNumbers()
        self._programs: dict[str, _Program] = {}
        self._live: dict[str, _Call] = {}
        self._failed = False
        try:
            self._path.open("ab").close()
        except OSError as error:
            fix = "give the path of a file that can be written to"
            raise InvalidRequestError(f"{path}: programs cannot be recorded here: {error.strerror}; {fix}") from None

    def see(self, batch: Sequence[Command | Event]) -> None:
        """Takes commands that are sent, or events that have come. Never raises: the programs must not suffer."""
        if self._failed:
            return
        now = self._clock()
        if self._began is None:
            self._began = now
        try:
            for item in batch:
                self._take(item, now - self._began)
        except Exception as error:
            self._failed = True
            self._programs.clear()
            self._live.clear()
            reason = error.strerror if isinstance(error, OSError) else repr(error)
            warnings.warn(f"{self._path}: recording has ended: {reason}", RuntimeWarning, stacklevel=2)

    def _take(self, item: Command | Event, now: float) -> None:
        match item:
            case OpenProgram():
                if item.program_id not in self._programs:
                    begin = self._blocks.hash(b"", item.tenant.encode())
                    self._programs[item.program_id] = _Program(item.program_id, item.kind, now, begin)
            case DeclareNode() if item.program_id in self._programs:
                self._programs[item.program_id].declare(item, now)
            case Resume() if item.program_id in self._programs:
                self._programs[item.program_id].ended(item.node_id, now)
            case SubmitCall() if item.program_id in self._programs and item.call_id not in self._live:
                self._submitted(item, now)
            case AppendPrompt() if item.call_id in self._live:
                self._appended(self._live[item.call_id], item.token_ids, now, is_complete=item.close)
            case CallFinished() if item.call_id in self._live:
                self._finished(self._live.pop(item.call_id), item, now)
            case ProgramEnded() if item.program_id in self._programs:
                self._write(self._programs.pop(item.program_id))
            case Rejected(error="unknown_program"):
                self._programs.pop(item.subject, None)

    def _submitted(self, command: SubmitCall, now: float) -> None:
        program = self._programs[command.program_id]
        if program.id in self.separate:
            parent = self._live.get(command.fork_of or "")
            program = parent.program if parent else _Program(command.call_id, program.kind, now, program.begin)
        call = program.submit(command, now)
        if call is not None:
            self._live[command.call_id] = call
            self._appended(call, command.token_ids, now, is_complete=not command.open)

    def _appended(self, call: _Call, token_ids: Sequence[int], now: float, *, is_complete: bool) -> None:
        self._blocks.extend(call.prompt, token_ids)
        if is_complete:
            call.complete = now
            call.program.complete.append(call)

    def _finished(self, call: _Call, event: CallFinished, now: float) -> None:
        program = call.program
        if event.reason in ("stop", "length"):
            call.finished, call.output_tokens = now, event.usage.decoded
        program.ended(call.node.id, now)
        program.num_live -= 1
        if program.id not in self._programs and not program.num_live:
            self._write(program)

    def _write(self, program: _Program) -> None:
        """Appends the line, or nothing of it."""
        calls = list(program.lines())
        if not calls:
            return
        line = {
            "recording": self._name,
            "program": program.id,
            "kind": program.kind,
            "start_s": round(program.opened, 6),
            "block_tokens": BLOCK_TOKENS,
            "calls": calls,
        }
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        with self._path.open("ab", buffering=0) as file:
            size = file.tell()
            written = 0
            try:
                while written < len(data):
                    written += file.write(data[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise


class _BlockNumbers:
    """Numbers of blocks, by first appearance. A number stands for a block and all before it."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._numbers: OrderedDict[bytes, int] = OrderedDict()
        self._unused = itertools.count()

    def hash(self, before: bytes, content: bytes) -> bytes:
        """The hash of what follows on what has the hash `before`."""
        return blake2b(before + content, key=self._key, digest_size=16).digest()

    def extend(self, prompt: _Prompt, token_ids: Sequence[int]) -> None:
        """Adds tokens to a prompt."""
        prompt.num_tokens += len(token_ids)
        prompt.rest.extend(token_ids)
        num_full = len(prompt.rest) // BLOCK_TOKENS * BLOCK_TOKENS
        for start in range(0, num_full, BLOCK_TOKENS):
            block = array("q", prompt.rest[start : start + BLOCK_TOKENS])
            prompt.hash = self.hash(prompt.hash, block.tobytes())
            prompt.add(self._number(prompt.hash))
        del prompt.rest[:num_full]

    def _number(self, digest: bytes) -> int:
        number = self._numbers.get(digest)
        if number is None:
            number = self._numbers[digest] = next(self._unused)
            if len(self._numbers) > MAX_BLOCKS:
                self._numbers.popitem(last=False)
        self._numbers.move_to_end(digest)
        return number


@dataclass(slots=True, eq=False)
class _Prompt:
    """A prompt so far: its full blocks as runs `[start, count]` of numbers, their hash, and the tokens after them."""

    hash: bytes
    num_tokens: int = 0
    runs: list[list[int]] = field(default_factory=list)
    rest: list[int] = field(default_factory=list)

    def add(self, number: int) -> None:
        """Adds a block."""
        if self.runs and sum(self.runs[-1]) == number:
            self.runs[-1][1] += 1
        else:
            self.runs.append([number, 1])


@dataclass(slots=True, eq=False)
class _Node:
    """A node of a program's graph, or a call that belongs to none. `cause` had ended last when it was declared."""

    id: str
    kind: str
    name: str
    declared: float
    cause: str | None
    ended: float | None = None
    inputs: dict[str, None] = field(default_factory=dict)
    calls: list[_Call] = field(default_factory=list)

    @property
    def needs(self) -> list[str]:
        """The nodes that it came of. Who passes values on as plain text, declares no inputs."""
        return list(self.inputs) or ([self.cause] if self.cause is not None else [])


@dataclass(slots=True, eq=False)
class _Call:
    """A call; `before` is what it extends: another call, or the same one before it was tried again."""

    program: _Program
    node: _Node
    before: _Call | None
    prompt: _Prompt
    complete: float = math.inf
    finished: float = math.inf
    output_tokens: int = 0

    @property
    def is_retry(self) -> bool:
        return self.before is not None and self.before.node is self.node


@dataclass(slots=True, eq=False)
class _Program:
    """A program that has not ended. `complete` are its calls in the order in which their prompts were."""

    id: str
    kind: str
    opened: float
    begin: bytes
    nodes: dict[str, _Node] = field(default_factory=dict)
    calls: dict[str, _Call] = field(default_factory=dict)
    complete: list[_Call] = field(default_factory=list)
    last_ended: str | None = None
    num_calls: int = 0
    num_live: int = 0

    def declare(self, command: DeclareNode, now: float) -> None:
        """Adds a node, or inputs to one."""
        if command.node_id in self.nodes or len(self.nodes) < MAX_NODES:
            node = self._node(command.node_id, command.kind, command.name, now)
            node.inputs.update(dict.fromkeys((*command.inputs, *filter(None, (command.extends,)))))

    def ended(self, node_id: str, now: float) -> None:
        """The value of a node is there, or will never be."""
        if node_id in self.nodes:
            self.nodes[node_id].ended = now
            self.last_ended = node_id

    def submit(self, command: SubmitCall, now: float) -> _Call | None:
        """Adds a call, unless there are too many."""
        if self.num_calls == MAX_CALLS:
            return None
        node = self._node(command.node_id or command.call_id, "llm", "", now)
        extended = self.calls.get(command.extends or "")
        if extended is not None:
            node.inputs[extended.node.id] = None
        call = _Call(self, node, node.calls[-1] if node.calls else extended, _Prompt(self.begin))
        node.calls.append(call)
        self.calls[command.call_id] = call
        self.num_calls += 1
        self.num_live += 1
        return call

    def lines(self) -> Iterator[dict[str, Any]]:
        """The calls that finished, each after those that it waited for."""
        calls = [call for call in self.complete if call.finished < math.inf]
        places = {call: place for place, call in enumerate(calls)}
        ancestors: list[int] = []  # of each call, a bit for each call that it came after
        streams: list[int] = []
        last: list[int] = []  # of each stream
        for place, call in enumerate(calls):
            nearest, outside = self._waited_for(call, places)
            known = 0
            for other in nearest:
                known |= ancestors[other]
            after = [other for other in nearest if not known >> other & 1]
            ancestors.append(known | sum(1 << other for other in after))
            extended = _recorded(call.before, places)
            if extended is None or last[streams[extended]] != extended or not ancestors[place] >> extended & 1:
                streams.append(len(last))
                last.append(place)
            else:
                streams.append(streams[extended])
                last[streams[place]] = place
            since = max((calls[other].finished for other in after), default=self.opened)
            awaited = max(outside, key=lambda node: node.ended or 0.0, default=None)
            is_next_turn = not call.is_retry and after == [extended]
            kind = awaited.kind if awaited is not None else "person" if is_next_turn else "none"
            yield {
                "stream": streams[place],
                "blocks": call.prompt.runs,
                "prompt_tokens": call.prompt.num_tokens,
                "output_tokens": call.output_tokens,
                "after": after,
                "pause_s": round(max(0.0, call.complete - since), 6),
                "pause_kind": kind,
                "tool": awaited.name if awaited is not None and kind == "tool" else "",
                "foreseen": bool(after) and not call.is_retry and call.node.declared < since,
            }

    def _node(self, node_id: str, kind: str, name: str, now: float) -> _Node:
        """A node by its id, made if it is new."""
        if node_id not in self.nodes:
            self.nodes[node_id] = _Node(node_id, kind, name, now, self.last_ended)
        return self.nodes[node_id]

    def _waited_for(self, call: _Call, places: dict[_Call, int]) -> tuple[list[int], list[_Node]]:
        """The nearest calls before one in the graph, and what was outside of the engine between them and it."""
        if call.is_retry and call.before in places:
            return [places[call.before]], []
        nearest: set[int] = set()
        outside = []
        todo = call.node.needs
        seen = set(todo)
        while todo:
            node = self.nodes.get(todo.pop())
            if node is None:
                continue
            ended = [places[other] for other in node.calls if other in places and other.finished <= call.complete]
            before = [place for place in ended if place < places[call]]
            if before:
                nearest.add(before[-1])
                continue
            if node.kind in PAUSES and node.ended is not None:
                outside.append(node)
            todo += [needed for needed in node.needs if needed not in seen]
            seen.update(node.needs)
        return sorted(nearest), outside


def _recorded(call: _Call | None, places: dict[_Call, int]) -> int | None:
    """The place of a call, or of the nearest that it extends."""
    while call is not None and call not in places:
        call = call.before
    return places[call] if call is not None else None
