"""The engine: carries out the scheduler's plans, and decides nothing.

One turn of the loop, `step`. With overlap the tokens of a step are read while the device computes the next one::

    host    | plan n | launch n | commit n-1 | sample n | plan n+1 | launch n+1 | commit n | ...
    device             [ forward n ........... ][sample n]           [ forward n+1 .............
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treadle.grammar import GrammarTimeoutError, constraint_from_json
from treadle.runtime.engine.runner import Forward, Launched, RowToken, Runner, SamplingCall
from treadle.runtime.engine.sampler import check_sampling
from treadle.runtime.engine.text import TextStream
from treadle.runtime.engine.wire import EngineInfo
from treadle.runtime.errors import InvalidRequestError
from treadle.scheduler import (
    AppendPrompt,
    CallFinished,
    Command,
    Decided,
    ErrorCode,
    Event,
    Inspected,
    Prepare,
    Prepared,
    Rejected,
    Row,
    RowOutput,
    Scheduler,
    StepPlan,
    StepResult,
    SubmitCall,
    Usage,
)

if TYPE_CHECKING:
    from treadle.grammar.compiler import Compiler
    from treadle.grammar.matcher import Grammar, Matcher
    from treadle.runtime.engine.learned import LearnedFile
    from treadle.runtime.text.tokenizer import Tokenizer


NO_GRAMMAR = "a model without a tokenizer cannot follow a grammar; leave out the constraint"


@dataclass(slots=True)
class _LiveCall:
    """What the engine keeps of a call: how to sample for it, its text so far, and what its grammar has accepted."""

    sampling: SamplingCall
    text: TextStream
    matcher: Matcher | None = None
    ended: bool = False


@dataclass(slots=True)
class _Step:
    """A plan on its way through the engine. `calls` are those of its rows, even if their ids name others by now."""

    plan: StepPlan
    started: float
    calls: dict[str, _LiveCall]
    failed: dict[str, str] = field(default_factory=dict)
    forwards: list[Forward] = field(default_factory=list)
    launched: list[Launched] = field(default_factory=list)


class Engine:
    """Scheduler, runner and text, turned step by step by whoever owns it. Not thread-safe.

    A call that makes a step raise ends with an error: the step is halved until the culprit is alone, and the others
    go on.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        tokenizer: Tokenizer | None,
        compiler: Compiler | None,
        clock: Callable[[], float],
        learned: LearnedFile | None = None,
        *,
        overlap: bool,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._tokenizer = tokenizer
        self.compiler = compiler
        self._clock = clock
        self._learned = learned
        self._overlap = overlap
        self._calls: dict[str, _LiveCall] = {}
        self._pending: _Step | None = None
        self._last_end = clock()

    def apply(self, commands: Iterable[Command]) -> list[Event]:
        """Takes commands; what they end or refuse at once is in the events."""
        events: list[Event] = []
        for command in commands:
            events += self._submit(command) if isinstance(command, SubmitCall) else self._forward_command(command)
        return self._with_last_text(events)

    def prepare(self, command: Prepare, answer: Callable[[Prepared | Rejected], object]) -> None:
        """Compiles a grammar beside the loop, and leaves it where calls will find it. Answers once, in any thread.

        What takes too long is rejected as too much for now: only what is wrong is wrong at the next attempt too.
        """

        def done(grammar: Grammar | BaseException) -> None:
            if isinstance(grammar, GrammarTimeoutError):
                answer(Rejected(name, "overloaded", str(grammar)))
            elif isinstance(grammar, BaseException):
                answer(Prepared(name, error=str(grammar)))
            else:
                answer(Prepared(name, grammar.unenforced))

        name = command.request_id
        try:
            if self.compiler is None:
                raise ValueError(NO_GRAMMAR)
            self.compiler.compile_soon(constraint_from_json(command.constraint), done, command.tenant)
        except ValueError as error:
            done(error)

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""
        config, runner = self.scheduler.config, self.runner
        return EngineInfo(
            max_context=self.scheduler.limits.max_context,
            max_calls=config.max_calls,
            num_pages=config.num_pages,
            num_host_pages=config.num_host_pages,
            page_size=config.page_size,
            page_bytes=runner.state.page_bytes,
            vocab_size=runner.decoder.config.vocab_size,
            dtype=str(runner.decoder.dtype).removeprefix("torch."),
            device=runner.device.torch_device.type,
        )

    def decided(self) -> Decided | None:
        """What was decided since the last time, if somebody watches and there was anything."""
        return self.scheduler.take_decided()

    def _submit(self, command: SubmitCall) -> list[Event]:
        try:
            check_sampling(command.sampling, self.runner.decoder.config.vocab_size)
            call = self._begin(command)
        except InvalidRequestError as error:
            return [self._refusal(command.call_id, "bad_sampling", str(error))]
        except ValueError as error:
            return [self._refusal(command.call_id, "bad_constraint", str(error))]
        events = self.scheduler.apply(command, self._clock())
        if not events:
            self._calls[command.call_id] = call
        return events

    def _begin(self, command: SubmitCall) -> _LiveCall:
        """A call as it is when it has generated what it comes with."""
        num_prompt = len(command.token_ids) - command.num_generated
        text = TextStream(self._tokenizer, command.sampling.stop, command.sampling.stop_token_ids)
        call = _LiveCall(SamplingCall(command.sampling, num_prompt), text, self._matcher(command))
        for token_id in command.token_ids[num_prompt:]:
            call.text.push(token_id)
            if call.matcher is not None and not call.matcher.accept(token_id):
                raise ValueError(f"the grammar refuses token {token_id}, which the call has generated")
        return call

    def _refusal(self, call_id: str, code: ErrorCode, message: str) -> Event:
        if call_id in self._calls:
            return Rejected(call_id, code, message)
        return CallFinished(call_id, "error", Usage(), error=code, message=message)

    def _matcher(self, command: SubmitCall) -> Matcher | None:
        if command.constraint is None:
            return None
        if self.compiler is None:
            raise ValueError(NO_GRAMMAR)
        tenant = self.scheduler.tenant(command.program_id)
        return self.compiler.compile(constraint_from_json(command.constraint), tenant).matcher()

    def _forward_command(self, command: Command) -> list[Event]:
        events = self.scheduler.apply(command, self._clock())
        if isinstance(command, AppendPrompt) and not events:
            call = self._calls[command.call_id]
            longer = call.sampling.num_prompt + len(command.token_ids)
            call.sampling = replace(call.sampling, num_prompt=longer)
        for event in events:
            if isinstance(event, Inspected):
                event.report["page_bytes"] = self.runner.state.page_bytes
        return events

    def step(self) -> list[Event] | None:
        """One turn of the loop. None if there is nothing to do until a command comes."""
        plan = self.scheduler.plan(self._clock())
        if plan is None and self._pending is None:
            return None
        step = self._launch(plan) if plan is not None else None
        events = self._commit(self._pending) if self._pending is not None else []
        self._pending = None
        if step is not None:
            self._sample(step)
            if self._overlap:
                self._pending = step
            else:
                events += self._commit(step)
        return events

    def touch_ahead(self) -> bool:
        """Gets some memory ready for calls to come; for when there is nothing to compute. False if all is ready."""
        return self.runner.state.touch_ahead(self.scheduler.memory.pool.num_ever_used)

    def close(self) -> None:
        """Keeps what was learned, if there is a file for it. There is no step after it."""
        if self._learned is not None:
            self._learned.save()

    def _launch(self, plan: StepPlan) -> _Step:
        step = _Step(plan, self._clock(), {row.call_id: self._calls[row.call_id] for row in plan.rows})
        self.runner.state.write(plan)
        if plan.rows:
            step.forwards = self._forward(plan.rows, step.failed)
        return step

    def _forward(self, rows: Sequence[Row], failed: dict[str, str]) -> list[Forward]:
        """Runs rows together, or, if that raises, in halves; a row that raises alone has failed."""
        try:
            return [self.runner.forward(rows)]
        except Exception as error:
            if len(rows) == 1:
                failed[rows[0].call_id] = _reason(error)
                return []
        middle = len(rows) // 2
        return self._forward(rows[:middle], failed) + self._forward(rows[middle:], failed)

    def _sample(self, step: _Step) -> None:
        waiting = step.forwards
        while waiting:
            forward = self._without_ended_calls(waiting.pop(0), step)
            try:
                step.launched.append(self.runner.sample(forward, self._sampling_calls(forward, step)))
            except Exception as error:
                if len(forward.rows) == 1:
                    step.failed[forward.rows[0].call_id] = _reason(error)
                    continue
                middle = len(forward.rows) // 2
                for half in (forward.rows[:middle], forward.rows[middle:]):
                    waiting += self._forward(half, step.failed)

    def _without_ended_calls(self, forward: Forward, step: _Step) -> Forward:
        """A call may have ended since its row was launched: there is nobody left to sample for."""
        live = [not step.calls[row.call_id].ended for row in forward.rows]
        if all(live):
            return forward
        sampling = [is_live for row, is_live in zip(forward.rows, live, strict=True) if row.sample]
        return Forward(tuple(compress(forward.rows, live)), forward.logits[sampling], forward.finite[live])

    def _sampling_calls(self, forward: Forward, step: _Step) -> dict[str, SamplingCall]:
        """How to sample for each call, with the tokens that its grammar allows now."""
        calls = {}
        for row in forward.rows:
            call = step.calls[row.call_id]
            if call.matcher is not None and row.sample:
                call.sampling = replace(call.sampling, bitmask=self._allowed(call.matcher))
            calls[row.call_id] = call.sampling
        return calls

    def _allowed(self, matcher: Matcher) -> Tensor | None:
        words = -(-self.runner.decoder.config.vocab_size // 32)
        bitmask = torch.full((1, words), -1, dtype=torch.int32)
        return bitmask[0] if matcher.fill(bitmask, 0) else None

    def _commit(self, step: _Step) -> list[Event]:
        """Brings the tokens of a step to the scheduler."""
        tokens = [token for launched in step.launched for token in self.runner.collect(launched)]
        end = self._clock()
        duration = end - max(step.started, self._last_end)
        self._last_end = end
        outputs = []
        for token in tokens:
            if token.token_id < 0:
                error = ArithmeticError("the model's output is not finite; check the weights, or use dtype float32")
                step.failed[token.row.call_id] = _reason(error)
            elif not (call := step.calls[token.row.call_id]).ended:
                try:
                    outputs.append(self._output(token, call))
                except Exception as error:
                    step.failed[token.row.call_id] = _reason(error)
        result = StepResult(step.plan.step_id, duration, tuple(outputs), tuple(step.failed.items()))
        return self._with_last_text(self.scheduler.complete(result, self._clock()))

    def _output(self, token: RowToken, call: _LiveCall) -> RowOutput:
        text, stop = call.text.push(token.token_id)
        if call.matcher is not None:
            if not call.matcher.accept(token.token_id):
                raise RuntimeError(f"the grammar refuses token {token.token_id}, which its mask allowed")
            stop = stop or call.matcher.is_done
        return RowOutput(token.row.call_id, (token.token_id,), text, stop, token.logprob)

    def _with_last_text(self, events: list[Event]) -> list[Event]:
        """Forgets the calls that ended, and gives their last event the text that was held back."""
        for index, event in enumerate(events):
            if isinstance(event, CallFinished) and event.call_id in self._calls:
                call = self._calls.pop(event.call_id)
                call.ended = True
                events[index] = replace(event, text=call.text.finish())
        return events


def _reason(error: Exception) -> str:
    reason = f"computing the call failed: {type(error).__name__}: {error}"
    # Torch's allocator of a CPU's memory raises a plain RuntimeError.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return f"{reason}; use a smaller max_step_tokens"
    return reason
