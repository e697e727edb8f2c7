"""The simulation: the real scheduler under a virtual clock, with costs in place of an engine.

    heap of (time, what a program does)  --commands-->  Scheduler.apply
    Scheduler.plan  --StepPlan-->  seconds of the step  --StepResult-->  Scheduler.complete

Only what an engine does is made up: how long a step takes, and which tokens come out. Pages, prefix tree, leases and
policies are those of production. A plan that could be repeated is repeated at once, up to the next thing that happens.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from treadle.scheduler.call import Call
from treadle.scheduler.commands import (
    CallFinished,
    Command,
    DeclareNode,
    EndProgram,
    OpenProgram,
    Resume,
    SubmitCall,
    TokensOut,
    Wait,
)
from treadle.scheduler.config import Costs, SchedulerConfig
from treadle.scheduler.core import Scheduler
from treadle.scheduler.kv import Lease
from treadle.scheduler.plan import RowOutput, StepPlan, StepResult
from treadle.scheduler.policies import Foresight
from treadle.scheduler.simulator.hardware import Hardware, pairs
from treadle.scheduler.simulator.workload import CallSpec, ProgramSpec, Workload


@dataclass(frozen=True, slots=True)
class Setup:
    """What a simulation runs on.

    Attributes:
        pool_tokens, host_tokens: KV that the device and the host hold.
        concurrency: Programs that run at once, the next one beginning when one ends; None begins each at its `start_s`.
        leap: Most steps that are taken at once while nothing is decided.
        clairvoyant: Policies know when programs come back, and how much calls will generate.
    """

    hardware: Hardware
    pool_tokens: int
    host_tokens: int = 0
    order: str = "fcfs"
    retention: str = "lru"
    admission: str = "greedy"
    concurrency: int | None = None
    page_tokens: int = 64
    patience: float = 1.0
    clairvoyant: bool = False
    leap: int = 64

    @property
    def policy(self) -> str:
        return f"{self.order}+{self.retention}+{self.admission}"


@dataclass(slots=True)
class ProgramRecord:
    """What became of a program. Times in seconds of the virtual clock."""

    id: str
    began: float
    ended: float = 0.0
    alone_s: float = 0.0
    first_token_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Outcome:
    """What became of all programs.

    `prompt` tokens were `cached` or `prefilled`; `new` is how many nobody could have had cached.
    """

    programs: list[ProgramRecord] = field(default_factory=list)
    seconds: float = 0.0
    busy_s: float = 0.0
    wall_s: float = 0.0
    plan_s: float = 0.0
    steps: int = 0
    plans: int = 0
    prompt: int = 0
    cached: int = 0
    new: int = 0
    decoded: int = 0
    re_prefilled: int = 0
    saved: int = 0
    loaded: int = 0


@dataclass(slots=True, eq=False)
class _Turn:
    """A call that was submitted."""

    run: _Run
    index: int
    submitted: float
    prompt: array[int]
    output: array[int]
    produced: int = 0


@dataclass(slots=True, eq=False)
class _Run:
    """A program on its way.

    `begins` has the times of calls that need no other call any more, `alone` the seconds after which calls end with
    the machine to themselves, and `last` the last ended call of each stream.
    """

    spec: ProgramSpec
    record: ProgramRecord
    declared: set[int] = field(default_factory=set)
    begins: dict[int, float] = field(default_factory=dict)
    alone: dict[int, float] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    last: dict[str, _Turn] = field(default_factory=dict)
    has_graph: bool = field(init=False)

    def __post_init__(self) -> None:
        self.has_graph = self.spec.has_graph

    def call_id(self, index: int) -> str:
        return f"{self.spec.id}/{index}"

    def pause_id(self, index: int) -> str:
        return f"{self.spec.id}/{index}/pause"

    def tells_pause(self, index: int) -> bool:
        """Whether the scheduler is told of the pause before a call; in a graph, if there is something to wait for."""
        return self.spec.calls[index].pause_kind != "none" if self.has_graph else index > 0


class Simulation:
    """Runs a workload to its end. A `stopwatch` of real seconds measures what that takes; nothing depends on it."""

    def __init__(self, workload: Workload, setup: Setup, stopwatch: Callable[[], float] = lambda: math.nan) -> None:
        self._stopwatch = stopwatch
        hardware, page = setup.hardware, setup.page_tokens
        self.setup = setup
        self.outcome = Outcome()
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_pages=setup.pool_tokens // page,
                vocab_size=None,
                max_context=setup.pool_tokens,
                page_size=page,
                num_slots=hardware.rows,
                max_step_tokens=hardware.step_tokens,
                num_host_pages=setup.host_tokens // page,
                order=setup.order,
                retention=setup.retention,
                admission=setup.admission,
                patience=setup.patience,
                costs=Costs(
                    hardware.step.per_token_s + hardware.step.fixed_s / hardware.step_tokens,
                    hardware.step.per_pair_s,
                    hardware.kv_bytes_per_token / hardware.copy.bytes_per_s_to_device,
                ),
            )
        )
        if setup.clairvoyant:
            self.scheduler.books.foresight = Foresight(self._returns, self._output_tokens)
        self.now = 0.0
        self._workload = workload
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._runs: dict[str, _Run] = {}
        self._turns: dict[str, _Turn] = {}
        self._queue = iter(workload.programs)
        if setup.concurrency is None:
            for spec in workload.programs:
                self._at(spec.start_s, partial(self._begin, spec, spec.start_s))
        else:
            for _ in range(setup.concurrency):
                self._begin_next()

    def run(self) -> Outcome:
        """Runs until every program has ended."""
        began = self._stopwatch()
        scheduler = self.scheduler
        while True:
            while self._later and self._later[0][0] <= self.now:
                heapq.heappop(self._later)[2]()
            before = self._stopwatch()
            plan = scheduler.plan(self.now, max_repeat=self.setup.leap)
            self.outcome.plan_s += self._stopwatch() - before
            self.outcome.plans += 1
            if plan is not None:
                self._step(plan)
            elif self._later:
                self.now = self._later[0][0]
            else:
                break
        outcome = self.outcome
        assert scheduler.num_running == scheduler.num_waiting == 0 and not self._runs, "stuck"
        outcome.seconds = self.now
        outcome.wall_s = self._stopwatch() - began
        outcome.saved = scheduler.memory.num_saved * self.setup.page_tokens
        outcome.loaded = scheduler.memory.num_loaded * self.setup.page_tokens
        return outcome

    def _returns(self, lease: Lease) -> float:
        """When the conversation of a lease goes on, if calls took no time; never, if it has ended."""
        run, ended = self._runs[lease.program_id], int(lease.owner.rpartition("/")[2])
        spec, times = run.spec, dict[int, float]()
        for index, call in enumerate(spec.calls):
            ready = max((times[other] for other in spec.waits_for(index)), default=self.now)
            times[index] = max(self.now, run.begins.get(index, ready + spec.pause_s(index)))
            if index > ended and call.stream == spec.calls[ended].stream:
                return times[index]
        return math.inf

    def _output_tokens(self, call: Call) -> int:
        return len(self._turns[call.id].output)

    def _at(self, when: float, act: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._later, (when, self._sequence, act))

    def _begin_next(self) -> None:
        spec = next(self._queue, None)
        if spec is not None:
            self._at(self.now, partial(self._begin, spec, self.now))

    def _send(self, *commands: Command) -> None:
        for command in commands:
            events = self.scheduler.apply(command, self.now)
            assert all(not isinstance(event, CallFinished) for event in events), events

    def _begin(self, spec: ProgramSpec, when: float) -> None:
        """A program begins, at a time that may be a moment ago."""
        run = self._runs[spec.id] = _Run(spec, ProgramRecord(spec.id, when))
        self._send(OpenProgram(spec.id, spec.kind))
        self._go_on(run)

    def _go_on(self, run: _Run) -> None:
        """Begins the pauses before the calls that wait for no other call any more."""
        spec = run.spec
        every = (index for index in range(len(spec.calls)) if index not in run.begins)
        ready = [index for index in every if run.ended.issuperset(spec.waits_for(index))]
        self._declare(run, ready)
        for index in ready:
            when = run.begins[index] = self.now + spec.pause_s(index)
            is_told = run.tells_pause(index)
            if is_told:
                self._send(Wait(spec.id, run.pause_id(index)))
            if is_told or when > self.now:
                self._at(when, partial(self._submit, run, index))
            else:
                self._submit(run, index)

    def _declare(self, run: _Run, ready: Sequence[int]) -> None:
        """Declares what is ready, and what was foreseen to follow that; without a graph, the pauses only."""
        spec = run.spec
        for index, call in enumerate(spec.calls):
            after = spec.waits_for(index)
            is_foreseen = call.foreseen and run.declared.issuperset(after)
            if index in run.declared or not (is_foreseen or index in ready):
                continue
            run.declared.add(index)
            needed = tuple(map(run.call_id, after)) if run.has_graph else ()
            if run.tells_pause(index):
                pause_id = run.pause_id(index)
                self._send(DeclareNode(spec.id, pause_id, "tool", call.tool or call.pause_kind, needed))
                needed = (pause_id,)
            if run.has_graph:
                self._send(DeclareNode(spec.id, run.call_id(index), "llm", inputs=needed))

    def _submit(self, run: _Run, index: int) -> None:
        spec, call = run.spec, run.spec.calls[index]
        if run.tells_pause(index):
            self._send(Resume(spec.id, run.pause_id(index)))
        prompt, output = self._workload.prompt_ids(spec, index), self._workload.output_ids(spec, index)
        before = run.last.get(call.stream)
        known = _common(before.prompt + before.output, prompt) if before is not None else 0
        self.outcome.prompt += len(prompt)
        self.outcome.new += len(prompt) - known
        began = max((run.alone[other] for other in spec.waits_for(index)), default=0.0)
        run.alone[index] = began + (self._alone(call, known) + spec.pause_s(index))
        call_id = run.call_id(index)
        self._turns[call_id] = _Turn(run, index, self.now, prompt, output)
        node_id = call_id if run.has_graph else None
        extends = run.call_id(before.index) if run.has_graph and before is not None else None
        self._send(SubmitCall(call_id, spec.id, prompt, node_id=node_id, extends=extends))

    def _alone(self, call: CallSpec, known: int) -> float:
        """Seconds of a call with the machine to itself and nothing ever lost."""
        step, start, total = self.setup.hardware.step, min(known, call.prompt_tokens - 1), 0.0
        while start < call.prompt_tokens:
            count = min(self.setup.hardware.step_tokens, call.prompt_tokens - start)
            total += step.seconds(count, pairs(start, count), 0)
            start += count
        count = call.output_tokens - 1
        context = count * call.prompt_tokens + count * (count + 1) // 2
        return total + count * step.seconds(1, 0, 0) + step.per_context_token_s * context

    def _step(self, plan: StepPlan) -> None:
        """Carries out a plan, as often as it may be repeated and nothing happens meanwhile."""
        step = self.setup.hardware.step
        repeat = plan.repeat
        new_tokens = prefill_pairs = context = decoding = 0
        for row in plan.rows:
            new_tokens += row.count
            if row.count > 1:
                prefill_pairs += pairs(row.start, row.count)
            else:
                context += row.end
                decoding += 1
            if row.sample:
                turn = self._turns[row.call_id]
                repeat = min(repeat, len(turn.output) - turn.produced)
        seconds = step.seconds(new_tokens, prefill_pairs, context) if plan.rows else 0.0
        until = min(plan.valid_until, self._later[0][0] if self._later else plan.valid_until)
        growth = step.per_context_token_s * decoding
        count, total = 1, seconds
        while count < repeat and self.now + total < until:
            total += seconds + growth * count
            count += 1
        total = max(total, self._copy_seconds(plan))
        outputs = []
        for row in plan.rows:
            if row.sample:
                turn = self._turns[row.call_id]
                ids = tuple(turn.output[turn.produced : turn.produced + count])
                turn.produced += count
                outputs.append(RowOutput(row.call_id, ids, stop=turn.produced == len(turn.output)))
        self.now += total
        self.outcome.busy_s += total
        self.outcome.steps += count
        result = StepResult(plan.step_id, total, tuple(outputs), repeated=count)
        for event in self.scheduler.complete(result, self.now):
            if isinstance(event, CallFinished):
                self._finished(event)
            elif isinstance(event, TokensOut):
                turn = self._turns[event.call_id]
                if turn.produced == len(event.token_ids):
                    turn.run.record.first_token_s.append(self.now - total + seconds - turn.submitted)

    def _copy_seconds(self, plan: StepPlan) -> float:
        """Copies overlap with the step's computing and with each other; they must be done when it ends."""
        hardware, page = self.setup.hardware, self.setup.page_tokens
        longest = 0.0
        for moves, speed in (
            (plan.saves, hardware.copy.bytes_per_s_to_host),
            (plan.loads, hardware.copy.bytes_per_s_to_device),
        ):
            if moves:
                size = len(moves) * page * hardware.kv_bytes_per_token
                longest = max(longest, hardware.copy.fixed_s + size / speed)
        return longest

    def _finished(self, event: CallFinished) -> None:
        assert event.reason == "stop", event
        turn = self._turns.pop(event.call_id)
        run, outcome, usage = turn.run, self.outcome, event.usage
        outcome.cached += usage.cached
        outcome.decoded += usage.decoded
        outcome.re_prefilled += usage.re_prefilled
        run.last[run.spec.calls[turn.index].stream] = turn
        run.ended.add(turn.index)
        if len(run.ended) < len(run.spec.calls):
            self._go_on(run)
            return
        self.scheduler.apply(EndProgram(run.spec.id), self.now)
        del self._runs[run.spec.id]
        run.record.ended = self.now
        run.record.alone_s = max(run.alone.values())
        outcome.programs.append(run.record)
        if self.setup.concurrency is not None:
            self._begin_next()


def _common(one: array[int], other: array[int]) -> int:
    """Length of the common prefix."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    low, high = 0, length
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
