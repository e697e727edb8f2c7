"""The scheduler: commands and step results in, events and step plans out. No clock, no thread, no tensor."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from typing import TypeVar

from treadle.scheduler.call import Call, Program, Status
from treadle.scheduler.commands import (
    AbortCall,
    AppendPrompt,
    CallFinished,
    Command,
    Decided,
    Decision,
    DeclareNode,
    EndProgram,
    ErrorCode,
    Event,
    FinishReason,
    Hint,
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
    Usage,
    Wait,
    Watch,
)
from treadle.scheduler.config import SchedulerConfig
from treadle.scheduler.graph import ProgramGraph
from treadle.scheduler.hints import Hints, answered
from treadle.scheduler.inspection import inspect
from treadle.scheduler.leases import Leases
from treadle.scheduler.limits import Limits, Problem
from treadle.scheduler.memory import CallMemory
from treadle.scheduler.plan import RowOutput, StepPlan, StepResult
from treadle.scheduler.planner import Planner
from treadle.scheduler.policies import ADMISSIONS, ORDERS, RETENTIONS, Books, Residency
from treadle.scheduler.roster import Roster

T = TypeVar("T")
MAX_TAILS = 1024
"""Ended calls of a program whose unfinished last pages are known; those of older calls are given up."""


class Scheduler:
    """Decides what each step computes.

    `plan` may be called again before the result of the plan before it is known (the engine then runs one step ahead);
    results are completed in the order of their plans. The same commands, results and times give the same decisions.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.limits = Limits(config.max_context, config.num_pages * config.page_size, config.vocab_size)
        self.decisions: deque[Decision] = deque(maxlen=config.max_decisions)
        self._watched: list[Decision] | None = None
        self._programs: dict[str, Program] = {}
        self.books = Books(config, self._programs)
        order = _make("order", config.order, ORDERS)
        self.residency = Residency(self.books, order, config.patience)
        self._retention = _make("retention", config.retention, RETENTIONS, self.books, self.residency)
        admission = _make("admission", config.admission, ADMISSIONS, self.books, self.residency)
        self.memory = self.books.memory = CallMemory(
            config.num_pages, config.num_host_pages, config.page_size, config.max_step_moves, self._retention
        )
        self._roster = self.books.roster = Roster(config.num_slots, order)
        self._leases = Leases(self.memory.tree, self.books.leases)
        self._hints = Hints(self._leases, self.memory, self.books, self._retention)
        self._planner = Planner(
            self.memory,
            self._roster,
            self._leases,
            self._retention,
            admission,
            self.books,
            config.max_step_tokens,
            self._decide,
        )
        self._calls: dict[str, Call] = {}
        self._in_flight: deque[tuple[StepPlan, list[tuple[Call, int]]]] = deque()
        self._num_arrivals = 0
        self._num_steps = 0

    # Commands

    def apply(self, command: Command, now: float) -> list[Event]:
        """Carries out one command. What cannot be done is answered by an event, never by an exception."""
        self._planner.stale = True
        match command:
            case OpenProgram():
                return self._open_program(command, now)
            case DeclareNode():
                return self._declare(command)
            case Wait() | Resume():
                return self._wait_or_resume(command, now)
            case SubmitCall():
                return self._submit(command, now)
            case AppendPrompt():
                return self._append(command, now)
            case AbortCall():
                call = self._calls.get(command.call_id)
                if call is None:
                    return [_no_such_call(command.call_id)]
                return [self._finish(call, "aborted", now)]
            case Hint():
                return self._hint(command, now)
            case EndProgram():
                return self._end_program(command, now)
            case Inspect():
                return [Inspected(command.request_id, inspect(self.books, self.decisions, command.subject, now))]
            case Watch():
                self._watched = [] if command.on else None
                return []
            case Prepare():
                return [Prepared(command.request_id, error="nothing is compiled ahead here; submit the call as it is")]

    def _open_program(self, command: OpenProgram, now: float) -> list[Event]:
        if command.program_id in self._programs:
            text = f"program {command.program_id!r} is open already; use another id, or end it first"
            return [Rejected(command.program_id, "duplicate_id", text)]
        if len(self._programs) >= self.config.max_programs:
            text = f"{self.config.max_programs} programs are open; end one, or try again later"
            return [Rejected(command.program_id, "overloaded", text)]
        if not math.isfinite(command.due_s):
            return [Rejected(command.program_id, "bad_deadline", f"a program cannot be due in {command.due_s} seconds")]
        self._programs[command.program_id] = Program(
            command.program_id,
            command.kind,
            command.tenant,
            self._next_arrival(),
            ProgramGraph(now),
            priority=command.priority,
            due=now + command.due_s,
        )
        return []

    def _declare(self, command: DeclareNode) -> list[Event]:
        program = self._programs.get(command.program_id)
        if program is None:
            return [_no_such_program(command.program_id)]
        if command.node_id not in program.graph and len(program.graph) >= self.config.max_nodes:
            text = f"the program has {self.config.max_nodes} nodes; split it into several programs"
            return [Rejected(command.node_id, "overloaded", text)]
        for needed in (*command.inputs, *filter(None, (command.extends,))):
            if needed not in program.graph:
                text = f"node {command.node_id!r} needs {needed!r}, which is not declared; declare it first"
                return [Rejected(command.node_id, "unknown_node", text)]
        program.graph.declare(command)
        return []

    def _wait_or_resume(self, command: Wait | Resume, now: float) -> list[Event]:
        program = self._programs.get(command.program_id)
        if program is None:
            return [_no_such_program(command.program_id)]
        if command.node_id not in program.graph:
            text = f"node {command.node_id!r} is not declared; send DeclareNode first"
            return [Rejected(command.node_id, "unknown_node", text)]
        if isinstance(command, Wait):
            program.graph.began(command.node_id, now - command.ago_s)
            self._tell_of_pause(program, program.graph.declared(command.node_id))
        else:
            seconds = program.graph.ended(command.node_id, now)
            if seconds is not None:
                self.books.durations.add((program.kind, program.graph.declared(command.node_id).name), seconds)
        return []

    def _tell_of_pause(self, program: Program, outside: DeclareNode) -> None:
        key = (program.kind, outside.name)
        if outside.typical_s is not None and outside.typical_s > 0:
            self.books.pauses.expect(key, outside.typical_s)
            self.books.durations.expect(key, outside.typical_s)
        self._leases.tell(program, outside.name)

    def _hint(self, command: Hint, now: float) -> list[Event]:
        program = self._programs.get(command.program_id)
        if program is None:
            return [answered(command, "dropped", reason=_no_such_program(command.program_id).message)]
        answer = self._hints.answer(program, command, now)
        kept = f"{answer.outcome}, {answer.num_tokens} tokens" + (
            f" for {answer.seconds:g} s" if answer.seconds else ""
        )
        self._decide(now, command.action, program, f"{kept}; {answer.reason}" if answer.reason else kept)
        return [answer]

    def _remaining_s(self, program: Program, node_id: str | None) -> float:
        if node_id is None:
            return 0.0
        return program.graph.remaining_s(node_id, lambda node: self.books.expected_node_s(program.kind, node))

    def _submit(self, command: SubmitCall, now: float) -> list[Event]:
        problem = self._submit_problem(command)
        if problem is not None:
            code, text = problem
            if command.call_id in self._calls:
                return [Rejected(command.call_id, code, text)]
            return [CallFinished(command.call_id, "error", Usage(), error=code, message=text)]
        program = self._programs[command.program_id]
        parent = self._calls[command.fork_of] if command.fork_of is not None else None
        if command.call_id in program.tails:
            del program.tails[command.call_id]
            self.memory.forget_tail(command.call_id)
        call = Call(
            id=command.call_id,
            program=program,
            namespace=program.tenant if self.config.prefix_cache else f"{program.tenant}/{command.call_id}",
            arrival=self._next_arrival(),
            tokens=array("i", command.token_ids),
            sampling=command.sampling,
            max_tokens=command.max_tokens,
            open=command.open,
            fork_of=parent,
            node_id=command.node_id,
            name=program.graph.declared(command.node_id).name if command.node_id is not None else "",
            extends=command.extends if command.extends in program.tails else None,
            num_prompt_tokens=len(command.token_ids) - command.num_generated,
            waiting_since=now,
            path_s=program.path_s,
            remaining_s=self._remaining_s(program, command.node_id),
            stop_token_ids=frozenset(command.sampling.stop_token_ids),
        )
        call.tally.decoded = command.num_generated
        self._calls[call.id] = program.calls[call.id] = call
        program.num_calls += 1
        if call.max_tokens is None and not call.open:
            call.max_tokens = self.limits.max_context - call.num_prompt_tokens
        if parent is not None and not parent.prompt_computed:
            parent.forks.append(call)
            self._decide(now, "park", call, f"forks {parent.id}, whose prompt is not computed yet")
        elif self.memory.has_work(call):
            self._enqueue(call, now)
        return []

    def _enqueue(self, call: Call, now: float) -> None:
        """A call has work to do from now on; whoever came to rest where it begins has come back in it."""
        self._planner.stale = True
        node = self.memory.find(call, now).deepest
        claimed = self._leases.claim(call, node)
        if claimed is not None and claimed.pause is not None:
            self.books.pauses.add(claimed.pause, now - claimed.since)
            call.program.pauses.add(now - claimed.since)
        self._leases.wait(call, node, now)
        self._roster.enqueue(call, now)

    def _submit_problem(self, command: SubmitCall) -> Problem:
        if command.call_id in self._calls:
            return "duplicate_id", f"call {command.call_id!r} is live already; use another id"
        program = self._programs.get(command.program_id)
        if program is None:
            return "unknown_program", f"program {command.program_id!r} is not open; send OpenProgram first"
        if command.node_id is not None and command.node_id not in program.graph:
            return "unknown_node", f"node {command.node_id!r} is not declared; send DeclareNode first"
        if len(self._calls) >= self.config.max_calls:
            return "overloaded", f"{self.config.max_calls} calls are live; try again later"
        if not command.token_ids and not command.open:
            return "empty_prompt", "the prompt has no tokens; give at least one"
        if command.fork_of is not None and not self._can_fork(command, program):
            text = f"{command.fork_of!r} is not a live call of this tenant with the same, complete prompt"
            return "bad_fork", f"{text}; submit the call without fork_of"
        return self.limits.tokens(command.token_ids) or self._length_problem(command)

    def _length_problem(self, command: SubmitCall) -> Problem:
        generated = command.num_generated
        num_prompt = len(command.token_ids) - generated
        if generated and not (0 < generated < (command.max_tokens or math.inf) and num_prompt > 0 and not command.open):
            return "bad_max_tokens", f"a call cannot go on after {generated} of its {len(command.token_ids)} tokens"
        return self.limits.length(num_prompt, command.max_tokens)

    def _can_fork(self, command: SubmitCall, program: Program) -> bool:
        parent = self._calls.get(command.fork_of or "")
        if parent is None or parent.open or command.open or parent.program.tenant != program.tenant:
            return False
        return tuple(parent.tokens[: parent.num_prompt_tokens]) == tuple(command.token_ids)

    def _append(self, command: AppendPrompt, now: float) -> list[Event]:
        call = self._calls.get(command.call_id)
        if call is None:
            return [_no_such_call(command.call_id)]
        if not call.open:
            text = f"the prompt of call {call.id!r} is complete; submit it with open=True to append to it"
            return [Rejected(call.id, "not_open", text)]
        num_prompt = call.num_prompt_tokens + len(command.token_ids)
        problem = self.limits.tokens(command.token_ids) or self.limits.length(num_prompt, call.max_tokens)
        if problem is None and command.close and num_prompt == 0:
            problem = "empty_prompt", "the prompt has no tokens; give at least one"
        if problem is not None:
            return [self._finish(call, "error", now, *problem)]
        call.tokens.extend(command.token_ids)
        call.num_prompt_tokens = num_prompt
        call.open = not command.close
        if command.close and call.max_tokens is None:
            call.max_tokens = self.limits.max_context - num_prompt
        if call.status is Status.PARKED and self.memory.has_work(call):
            self._enqueue(call, now)
        elif call.status is Status.WAITING:
            self._roster.reorder()
        return []

    def _end_program(self, command: EndProgram, now: float) -> list[Event]:
        program = self._programs.get(command.program_id)
        if program is None:
            return [_no_such_program(command.program_id)]
        events: list[Event] = [self._finish(call, "aborted", now) for call in list(program.calls.values())]
        for call_id in sorted(program.tails):
            self.memory.forget_tail(call_id)
        self._leases.drop(program)
        self._retention.resumed(program, now)
        self.books.turns.append(program.num_calls)
        del self._programs[program.id]
        graph = program.graph
        ended = ProgramEnded(
            program.id,
            calls=program.num_calls,
            usage=program.tally.usage(),
            nodes=len(graph),
            duration_s=now - graph.opened,
            tool_wait_s=graph.tool_wait_s,
            critical_path=graph.critical_path(),
        )
        return [*events, ended]

    # Steps

    def plan(self, now: float, *, max_repeat: int = 1) -> StepPlan | None:
        """The next step; None if nothing can be computed before a command or a result comes.

        A step that nothing depends on may be asked for up to `max_repeat` times at once: see `StepPlan.repeat`.
        """
        planned = self._planner.plan(self._num_steps + 1, now, max_repeat)
        if planned is None:
            return None
        plan, calls = planned
        self._num_steps += 1
        self.memory.step_launched(plan.step_id)
        self._in_flight.append((plan, [(call, call.epoch) for call in calls]))
        return plan

    def complete(self, result: StepResult, now: float) -> list[Event]:
        """Takes the result of the oldest plan in flight: tokens are appended, pages published, calls ended."""
        plan, calls = self._in_flight.popleft()
        assert plan.step_id == result.step_id, f"result of step {result.step_id}, expected {plan.step_id}"
        if self.memory.step_completed(plan.step_id, now):
            self._planner.stale = True
        more = result.repeated - 1
        self.books.observe_step(plan.num_tokens, result.duration / result.repeated)
        outputs = {output.call_id: output for output in result.outputs}
        failed = dict(result.failed)
        seconds_per_token = result.duration / max(1, plan.num_tokens)
        events: list[Event] = []
        for row, (call, epoch) in zip(plan.rows, calls, strict=True):
            if call.status is Status.FINISHED:
                self._decide(now, "drop", call, f"step {plan.step_id} was launched before the call ended")
            elif row.call_id in failed:
                call.num_pending -= row.sample
                events.append(self._finish(call, "error", now, "engine", failed[row.call_id]))
            else:
                call.num_planned_tokens += more
                call.account_computed(row.start, row.end + more, row.count * seconds_per_token)
                if row.sample:
                    call.num_pending -= 1
                    call.tokens.extend(outputs[row.call_id].token_ids)
                if call.epoch == epoch:
                    self._advance(call, row.end + more, now)
                if row.sample:
                    events += self._commit(call, outputs[row.call_id], call.epoch == epoch, now)
                elif call.epoch == epoch and self._rests(call):
                    self._park(call, now)
        return events

    def _advance(self, call: Call, end: int, now: float) -> None:
        """A row was computed: its full pages are published, and the forks that waited for the prompt can start."""
        call.num_computed_tokens = end
        for index, page in self.memory.publish(call, now):
            self._decide(now, "share", call, f"page {index} was computed twice; uses page {page} from now on")
            call.num_sent_pages = min(call.num_sent_pages, index)
        if call.prompt_computed and end <= call.num_prompt_tokens:
            self._planner.stale = True  # others may share the prompt from now on
        if call.forks and call.prompt_computed:
            self._release_forks(call, now)

    def _commit(self, call: Call, output: RowOutput, keeps_slot: bool, now: float) -> list[Event]:
        """Reports sampled tokens, and ends the call if they were its last."""
        if keeps_slot:
            call.num_sent_tokens += len(output.token_ids)
        call.tally.decoded += len(output.token_ids)
        logprobs = (output.logprob,) if output.logprob is not None else ()
        events: list[Event] = [TokensOut(call.id, output.token_ids, output.text, logprobs)]
        if output.stop or output.token_ids[-1] in call.stop_token_ids:
            events.append(self._finish(call, "stop", now))
        elif call.max_tokens is not None and len(call.tokens) - call.num_prompt_tokens >= call.max_tokens:
            events.append(self._finish(call, "length", now))
        return events

    def _rests(self, call: Call) -> bool:
        """Whether a call with a slot has nothing to compute until its prompt grows or is closed."""
        if call.num_planned_tokens > call.num_computed_tokens:
            return False
        return call.num_uncomputed == 0 or not self.memory.has_work(call)

    def _park(self, call: Call, now: float) -> None:
        """The slot is given up. What was computed stays, as long as memory lasts."""
        self._planner.stale = True
        self._leases.park(call, self.memory.detach(call, now, keep_tail=True), now)
        self._roster.leave(call, Status.PARKED, now)
        if not call.open:
            self._enqueue(call, now)

    def _release_forks(self, parent: Call, now: float) -> None:
        for fork in parent.forks:
            if fork.status is Status.PARKED:
                self._enqueue(fork, now)
        parent.forks.clear()

    def _finish(
        self, call: Call, reason: FinishReason, now: float, error: ErrorCode | None = None, message: str = ""
    ) -> CallFinished:
        self._planner.stale = True
        self._leases.end(call)
        if call.node is not None:
            # A step in flight may still write the last page: then it is not kept.
            idle = call.num_planned_tokens == call.num_computed_tokens
            keep_tail = idle and reason in ("stop", "length")
            node = self.memory.detach(call, now, keep_tail=keep_tail)
            if keep_tail:
                self._remember_tail(call)
                call.program.tool = ""
                lease = self._leases.park(call, node, now)
                if not call.program.calls.keys() - {call.id}:
                    self._retention.rested(call.program, lease, now)
                self.books.outputs.add((call.program.kind, call.name), call.num_generated)
        else:
            self.memory.forget_tail(call.id)
        self._roster.leave(call, Status.FINISHED, now)
        self._release_forks(call, now)
        program = call.program
        if call.node_id is not None:
            program.graph.ended(call.node_id, now)
        program.tally.add(call.tally)
        program.path_s = max(program.path_s, call.path_s + call.tally.service_s)
        del self._calls[call.id], program.calls[call.id]
        self._decide(now, "finish", call, message or reason)
        return CallFinished(call.id, reason, call.tally.usage(), error=error, message=message)

    def _remember_tail(self, call: Call) -> None:
        """Whoever extends one of the program's last calls need not compute its unfinished page again."""
        tails = call.program.tails
        tails[call.id] = None
        if len(tails) > MAX_TAILS:
            oldest = next(iter(tails))
            del tails[oldest]
            self.memory.forget_tail(oldest)

    def graph(self, program_id: str) -> ProgramGraph | None:
        """The declared graph of an open program."""
        program = self._programs.get(program_id)
        return program.graph if program is not None else None

    def tenant(self, program_id: str) -> str:
        """Whose an open program is; nobody's, if it is not open."""
        program = self._programs.get(program_id)
        return program.tenant if program is not None else ""

    @property
    def num_in_flight(self) -> int:
        """Steps launched and not completed."""
        return len(self._in_flight)

    @property
    def num_running(self) -> int:
        """Calls that hold a slot."""
        return len(self._roster.running)

    @property
    def num_waiting(self) -> int:
        """Calls that have work to do and hold no slot."""
        return self._roster.num_waiting

    def check_integrity(self) -> None:
        """Asserts everything that must hold between any two calls of this class. For tests: it walks all state."""
        self._roster.check_integrity(self._calls.values())
        self.memory.check_integrity(self._roster.running)
        for call in self._calls.values():
            assert self._programs[call.program.id].calls[call.id] is call
            assert call.num_computed_tokens <= call.num_planned_tokens <= call.num_tokens
            assert (call.node is not None) == (call.status is Status.RUNNING)
        if not self._in_flight:
            for call in self._calls.values():
                assert call.num_pending == 0 and call.num_computed_tokens == call.num_planned_tokens
            assert self.memory.num_deferred == 0

    def take_decided(self) -> Decided | None:
        """What was decided since the last time, if somebody watches and there was anything."""
        if not self._watched:
            return None
        decided = Decided(tuple(self._watched))
        self._watched = []
        return decided

    def _decide(self, now: float, action: str, subject: Call | Program, reason: str) -> None:
        program = subject if isinstance(subject, Program) else subject.program
        decision = Decision(now, action, subject.id, reason, program.id)
        self.decisions.append(decision)
        if self._watched is not None:
            self._watched.append(decision)

    def _next_arrival(self) -> int:
        self._num_arrivals += 1
        return self._num_arrivals


def _no_such_program(program_id: str) -> Rejected:
    return Rejected(program_id, "unknown_program", f"program {program_id!r} is not open; it may have ended already")


def _no_such_call(call_id: str) -> Rejected:
    return Rejected(call_id, "unknown_call", f"call {call_id!r} is not live; it may have ended already")


def _make(what: str, name: str, choices: Mapping[str, Callable[..., T]], *context: object) -> T:
    """Makes the policy `name`, which may carry seconds as in `fixed:30`."""
    kind, colon, argument = name.partition(":")
    make = _choose(what, kind, choices)
    if not colon:
        return make(*context)
    try:
        seconds = float(argument)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{what} policy {name!r}: after the colon comes a number of seconds above 0")
    try:
        return make(*context, seconds)
    except TypeError:
        raise ValueError(f"{what} policy {kind!r} takes no number; write it without {colon + argument!r}") from None


def _choose(what: str, name: str, choices: Mapping[str, T]) -> T:
    if name not in choices:
        raise ValueError(f"unknown {what} policy {name!r}; choose one of {', '.join(sorted(choices))}")
    return choices[name]
