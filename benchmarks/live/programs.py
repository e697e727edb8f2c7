"""Scripted programs, for a live engine and for the simulator alike: conversations with pauses between their turns."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from treadle.runtime.engine.engine import Engine
from treadle.scheduler import (
    CallFinished,
    Command,
    DeclareNode,
    EndProgram,
    Event,
    OpenProgram,
    Resume,
    SamplingParams,
    SubmitCall,
    TokensOut,
    Wait,
)
from treadle.scheduler.simulator import Blocks, CallSpec, ProgramSpec, Workload

Key = tuple[str, int]
"""A program's id and the number of a turn."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What is new in a prompt, how many tokens are generated, and the seconds that the program pauses before it."""

    new_ids: tuple[int, ...]
    output_tokens: int
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Script:
    """A conversation: each prompt is the one before, what was generated for it, and something new."""

    id: str
    turns: tuple[Turn, ...]
    start_s: float = 0.0
    kind: str = "script"


@dataclass(frozen=True, slots=True)
class Scripted(Workload):
    """Scripts as the simulator takes them. `outputs` are the tokens that their turns are known to generate."""

    scripts: Mapping[str, Script] = field(default_factory=dict)
    outputs: Mapping[Key, Sequence[int]] = field(default_factory=dict)

    def prompt_ids(self, program: ProgramSpec, index: int) -> array[int]:
        ids = array("i")
        for number, turn in enumerate(self.scripts[program.id].turns[: index + 1]):
            ids.extend(turn.new_ids)
            if number < index:
                ids.extend(self.outputs[program.id, number])
        return ids

    def output_ids(self, program: ProgramSpec, index: int) -> array[int]:
        return array("i", self.outputs[program.id, index])


def workload(scripts: Sequence[Script], outputs: Mapping[Key, Sequence[int]]) -> Scripted:
    """The workload of some scripts, in their order."""
    programs = []
    for script in scripts:
        calls, tokens = [], 0
        for turn in script.turns:
            tokens += len(turn.new_ids)
            calls.append(CallSpec("main", Blocks(), tokens, turn.output_tokens, turn.pause_s, "tool", "script"))
            tokens += turn.output_tokens
        programs.append(ProgramSpec(script.id, script.kind, script.start_s, tuple(calls), script.id))
    return Scripted("scripted", 1, tuple(programs), {script.id: script for script in scripts}, outputs)


@dataclass(slots=True)
class Progress:
    """A script on its way: `ids` are all tokens of the conversation so far. Times are those of the clock."""

    script: Script
    began: float
    ended: float = 0.0
    index: int = 0
    ids: array[int] = field(default_factory=lambda: array("i"))
    outputs: list[list[int]] = field(default_factory=list)
    prompt_tokens: int = 0
    cached: int = 0

    @property
    def call_id(self) -> str:
        return f"{self.script.id}/{self.index}"


class Live:
    """Runs scripts on an engine, sending what the simulator sends, in the same order.

    Args:
        clock: The engine's clock.
        wait: Waits until a time of that clock.
        concurrency: Programs that run at once, the next one beginning when one ends; None begins each at its `start_s`.
        sampling: How the tokens of a turn are chosen; what ends it is up to this too, beside the script's length.
    """

    def __init__(
        self,
        engine: Engine,
        scripts: Sequence[Script],
        clock: Callable[[], float],
        wait: Callable[[float], None],
        concurrency: int | None,
        sampling: Callable[[Key], SamplingParams],
    ) -> None:
        self.done: list[Progress] = []
        self._engine = engine
        self._clock = clock
        self._wait = wait
        self._sampling = sampling
        self._concurrency = concurrency
        self._later: list[tuple[float, int, Progress]] = []
        self._sequence = 0
        self._running: dict[str, Progress] = {}
        self._queue = iter(scripts)
        self._began = clock()
        if concurrency is None:
            for script in scripts:
                self._at(self._began + script.start_s, Progress(script, self._began + script.start_s))
        else:
            for _ in range(concurrency):
                self._begin_next()

    def run(self, after_step: Callable[[], None] = lambda: None) -> list[Progress]:
        """Runs until every program has ended, and returns them in the order in which they did."""
        while True:
            while self._later and self._later[0][0] <= self._clock():
                self._act(heapq.heappop(self._later)[2])
            events = self._engine.step()
            after_step()
            if events is not None:
                self._take(events)
            elif self._later:
                self._wait(self._later[0][0])
            else:
                assert not self._running, "stuck"
                return self.done

    @property
    def seconds(self) -> float:
        """From the beginning to the end of the last program."""
        return max(progress.ended for progress in self.done) - self._began

    def _at(self, when: float, progress: Progress) -> None:
        self._sequence += 1
        heapq.heappush(self._later, (when, self._sequence, progress))

    def _begin_next(self) -> None:
        script = next(self._queue, None)
        if script is not None:
            self._at(self._clock(), Progress(script, self._clock()))

    def _send(self, *commands: Command) -> None:
        events = self._engine.apply(commands)
        assert all(not isinstance(event, CallFinished) for event in events), events

    def _act(self, progress: Progress) -> None:
        """A program's next turn begins, the program with it if it is the first."""
        script, index = progress.script, progress.index
        if index == 0:
            self._send(OpenProgram(script.id, script.kind))
        else:
            self._send(Resume(script.id, f"{progress.call_id}/pause"))
        turn = script.turns[index]
        progress.ids.extend(turn.new_ids)
        progress.outputs.append([])
        self._running[progress.call_id] = progress
        sampling = self._sampling((script.id, index))
        self._send(SubmitCall(progress.call_id, script.id, array("i", progress.ids), sampling, turn.output_tokens))

    def _take(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, TokensOut):
                progress = self._running[event.call_id]
                progress.outputs[-1] += event.token_ids
                progress.ids.extend(event.token_ids)
            elif isinstance(event, CallFinished):
                self._finished(event)

    def _finished(self, event: CallFinished) -> None:
        assert event.error is None, event
        progress = self._running.pop(event.call_id)
        script = progress.script
        progress.cached += event.usage.cached
        progress.prompt_tokens += len(progress.ids) - len(progress.outputs[-1])
        progress.index += 1
        if progress.index == len(script.turns):
            self._engine.apply([EndProgram(script.id)])
            progress.ended = self._clock()
            self.done.append(progress)
            if self._concurrency is not None:
                self._begin_next()
            return
        pause = f"{progress.call_id}/pause"
        self._send(DeclareNode(script.id, pause, "tool", "script"), Wait(script.id, pause))
        self._at(self._clock() + script.turns[progress.index].pause_s, progress)
