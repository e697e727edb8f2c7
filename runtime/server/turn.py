"""One turn of a model, whichever endpoint asked for it: a `TurnRequest` in, events out."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias

from treadle.grammar import Constraint, ToolSpec
from treadle.runtime.engine.session import CallStream
from treadle.runtime.server.admission import Ticket
from treadle.runtime.server.context import Server, request_headers
from treadle.runtime.server.errors import ApiError, invalid
from treadle.runtime.server.identity import Identity
from treadle.runtime.server.merge import merged
from treadle.runtime.server.pace import Pace
from treadle.runtime.server.program import LiveProgram, TurnNode
from treadle.runtime.server.prompts import encode_beside
from treadle.runtime.server.tenants import Tenant
from treadle.runtime.server.tool_pieces import ArgumentPiece, CallBegun, ContentPiece, Piece, ToolPieces
from treadle.runtime.server.tracing import TurnFacts
from treadle.runtime.server.turn_constraint import callable_tools, prepared_constraint
from treadle.runtime.server.watchers import last, traced_id
from treadle.scheduler import CallFinished, SamplingParams, SubmitCall, TokenLogprob, TokensOut

TurnReason: TypeAlias = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """What an endpoint wants of the model.

    Attributes:
        messages: A conversation: each has `role` and `content`, and perhaps `tool_calls`, `tool_call_id`, `name`, as in
            the chat API, with content as text or None. Or None, for a `prompt`.
        prompt: Text or token ids to go on from.
        tools: All that the model is told of.
        callable_tools: Names of those that it may call; None means all.
        tool_mode: Whether it may call tools, must, or must not.
        parallel: Whether it may call several at once.
        strict_tools: Names of the tools whose schema must be enforced as a whole, or the request refused.
        answer: What the text must be that is no tool call.
        max_tokens: Most tokens to generate; None, or what exceeds the context, means as many as it holds.
        with_token_ids: Whether text comes with the ids that it is of, and ids come where there is no text.
        n: How many answers. Their seeds are seed, seed + 1, ...
        name: Of the turn, for people.
    """

    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | tuple[int, ...] | None = None
    tools: tuple[ToolSpec, ...] = ()
    callable_tools: tuple[str, ...] | None = None
    tool_mode: Literal["auto", "none", "required"] = "auto"
    parallel: bool = True
    strict_tools: frozenset[str] = frozenset()
    answer: Constraint | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    with_token_ids: bool = False
    n: int = 1
    name: str = "turn"

    @property
    def num_characters(self) -> int:
        """How much text has to become tokens."""
        messages = self.messages or ()
        said = sum(len(message.get("content") or "") for message in messages)
        called = sum(
            len(call["function"]["arguments"]) for message in messages for call in message.get("tool_calls") or ()
        )
        told = sum(len(tool.description) + len(tool.parameters) for tool in self.tools)
        return said + called + told + (len(self.prompt) if isinstance(self.prompt, str) else 0)


@dataclass(frozen=True, slots=True)
class TurnUsage:
    """Tokens of a turn. The prompt counts once, however many answers it has; `cached` is what was not computed."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of one answer. `logprobs` and `token_ids` are of the tokens whose text ends here, if asked for."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallStarted:
    """A tool call begins: `call` counts those of the answer from 0."""

    index: int
    call: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More text of a call's arguments; together they are a JSON object."""

    index: int
    call: int
    text: str


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """The last event of an answer. `usage` is of the whole turn so far: of the last answer to end, of all of it."""

    index: int
    reason: TurnReason
    usage: TurnUsage


TurnEvent: TypeAlias = TextDelta | ToolCallStarted | ToolCallArguments | TurnFinished


class Answer:
    """One of a turn's answers while it is written: tokens in, events out."""

    def __init__(self, index: int, request: TurnRequest) -> None:
        self.index = index
        self.text = ""
        self.tool_calls: list[dict[str, Any]] = []
        self._pieces = ToolPieces() if callable_tools(request) else None
        self._stops = frozenset(request.sampling.stop_token_ids)
        self._with_token_ids = request.with_token_ids
        self._num_told = 0
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def take(self, tokens: TokensOut) -> Iterator[TurnEvent]:
        """What these tokens bring."""
        self._token_ids += tokens.token_ids
        self._logprobs += [each for each in tokens.logprobs if each.token_id not in self._stops]
        yield from self._push(tokens.text)

    def finish(self, text: str) -> Iterator[TurnEvent]:
        """What the last text brings, and what was held back."""
        yield from self._push(text)
        for piece in self._pieces.finish() if self._pieces is not None else ():
            yield self._event(piece)
        if self._logprobs and not self.tool_calls:
            yield self._delta("")

    def reason(self, finished: CallFinished) -> TurnReason:
        """Why it ended, as clients are told."""
        if finished.reason == "length":
            return "length"
        return "tool_calls" if self.tool_calls else "stop"

    def message(self) -> dict[str, Any]:
        """The assistant's message, as it comes back in the next turn."""
        calls = {"tool_calls": self.tool_calls} if self.tool_calls else {}
        return {"role": "assistant", "content": self.text or (None if calls else ""), **calls}

    def own_ids(self) -> tuple[int, ...]:
        """All that was generated but for the token that ended it: what the message is in the next prompt.

        Nothing if a stop string ended it: the last token may then say more than the message does.
        """
        *rest, last = self._token_ids or [-1]
        return tuple(rest) if last in self._stops else ()

    def _push(self, text: str) -> Iterator[TurnEvent]:
        if self._pieces is None:
            if text or (self._with_token_ids and len(self._token_ids) > self._num_told):
                yield self._delta(text)
            return
        for piece in self._pieces.push(text) if text else ():
            yield self._event(piece)
        if self._pieces.in_call:
            self._logprobs.clear()

    def _event(self, piece: Piece) -> TurnEvent:
        match piece:
            case ContentPiece(text):
                return self._delta(text)
            case CallBegun(call, name):
                function = {"name": name, "arguments": ""}
                self.tool_calls.append({"id": new_call_id(), "type": "function", "function": function})
                return ToolCallStarted(self.index, call, self.tool_calls[call]["id"], name)
            case ArgumentPiece(call, text):
                self.tool_calls[call]["function"]["arguments"] += text
                return ToolCallArguments(self.index, call, text)

    def _delta(self, text: str) -> TextDelta:
        self.text += text
        logprobs, self._logprobs = tuple(self._logprobs), []
        if not self._with_token_ids:
            return TextDelta(self.index, text, logprobs)
        token_ids, self._num_told = tuple(self._token_ids[self._num_told :]), len(self._token_ids)
        return TextDelta(self.index, text, logprobs, token_ids)


def new_call_id() -> str:
    """An id of a tool call, which nobody else has."""
    return f"call_{secrets.token_hex(12)}"


class Turn:
    """A turn under way.

    Attributes:
        program: The program that it belongs to.
        usage: What its answers took so far.
        failure: What went wrong while they were written: a stream tells its client, and nobody else.
    """

    def __init__(self, server: Server, node: TurnNode, request: TurnRequest, ticket: Ticket) -> None:
        self.program = node.program
        self.usage = TurnUsage()
        self.failure = ""
        self._server = server
        self._node = node
        self._request = request
        self._ticket = ticket
        self._pace = Pace(server.metrics)
        self._streams: list[CallStream] = []
        self._reasons: list[TurnReason] = []

    @property
    def n(self) -> int:
        """How many answers it has."""
        return self._request.n

    def submit(self, token_ids: tuple[int, ...], constraint: str | None) -> None:
        """Submits a call for each answer; all but the first share the first one's prompt.

        Raises `ApiError` 409 if the program was ended while the prompt was encoded.
        """
        if self.program.ended is not None:
            raise ended_meanwhile()
        request, session = self._request, self._server.session
        room = self._server.engine.max_context - len(token_ids)
        call_ids = [session.new_id("call") for _ in range(request.n)]
        calls = [
            SubmitCall(
                call_id,
                self.program.id,
                token_ids,
                replace(request.sampling, seed=request.sampling.seed + index),
                None if request.max_tokens is None else min(request.max_tokens, room),
                fork_of=call_ids[0] if index else None,
                node_id=self._node.node_id,
                extends=self._node.extends,
                constraint=constraint,
            )
            for index, call_id in enumerate(call_ids)
        ]
        self.usage = TurnUsage(prompt=len(token_ids))
        self._streams = session.submit(*calls)

    async def events(self) -> AsyncGenerator[TurnEvent, None]:
        """Everything that the model says, as it says it. To be read once.

        Raises `TreadleError` if a call fails, and `ApiError` 409 if the program was ended meanwhile.
        """
        answers = [Answer(index, self._request) for index in range(self.n)]
        try:
            async with contextlib.aclosing(merged([whole(stream) for stream in self._streams])) as batches:
                async for index, batch in batches:
                    answer = answers[index]
                    if isinstance(batch, TokensOut):
                        self._count(index, len(batch.token_ids))
                        for event in answer.take(batch):
                            yield event
                        continue
                    if batch.reason == "aborted":
                        raise ended_meanwhile()
                    for event in answer.finish(batch.text):
                        yield event
                    yield self._finished(answer, batch)
        except Exception as error:
            self.failure = type(error).__name__
            raise

    def abort(self) -> None:
        """Ends the calls that have not ended."""
        for stream in self._streams:
            stream.abort()

    def trace(self, failure: str) -> None:
        """Writes the turn's span, when it is over. `failure` names what went wrong."""
        program, pace = self.program, self._pace
        facts = TurnFacts(
            program_id=traced_id(program.tenant.name, program.public_id),
            headers=request_headers.get(),
            prompt_tokens=self.usage.prompt,
            cached_tokens=self.usage.cached,
            generated_tokens=self.usage.completion,
            finish_reasons=self._reasons,
            first_token_s=pace.first_token_s,
            error=failure,
        )
        self._server.tracing.turn_ended(facts, last(pace.elapsed_s))

    @property
    def is_complete(self) -> bool:
        """Whether every answer has come to its end."""
        return bool(self._streams) and all(
            stream.finished is not None and stream.finished.error is None for stream in self._streams
        )

    def _count(self, index: int, num_tokens: int) -> None:
        """Tokens are charged as they come, and the prompt with the first: who leaves early has used them too."""
        self._ticket.began()
        is_first = self._pace.first_token_s is None
        self._ticket.charge(num_tokens + (self.usage.prompt if is_first else 0))
        self._server.metrics.generated(num_tokens)
        self._pace.tokens(index)
        self.usage = replace(self.usage, completion=self.usage.completion + num_tokens)

    def _finished(self, answer: Answer, finished: CallFinished) -> TurnFinished:
        if answer.index == 0:  # the other answers have their prompt from the first
            self.usage = replace(self.usage, cached=finished.usage.cached)
        self._server.metrics.call_ended(finished.usage, continues=self._node.extends is not None)
        reason = answer.reason(finished)
        self._reasons.append(reason)
        self._server.programs.end_turn(
            self._node,
            call_id=finished.call_id,
            message=answer.message(),
            token_ids=answer.own_ids(),
            finish_reason=reason,
        )
        return TurnFinished(answer.index, reason, self.usage)


@contextlib.asynccontextmanager
async def run_turn(server: Server, tenant: Tenant, identity: Identity, request: TurnRequest) -> AsyncIterator[Turn]:
    """Submits the calls of a turn. Leaving the scope aborts those that have not ended.

    Raises `ApiError` or `TreadleError` before anything is submitted for a request that cannot be, or not now.
    """
    if server.draining:
        raise ApiError(503, "the server ends; try another one", type="server_error", code="draining", retry_after=5.0)
    with server.admission.admit(tenant) as ticket:
        constraint = await prepared_constraint(server.session, tenant.name, request)
        program = await server.programs.enter(tenant, identity, request.messages)
        node = server.programs.begin_turn(program, identity, request.messages, request.name)
        turn, failure = Turn(server, node, request, ticket), ""
        try:
            turn.submit(await encoded(server, request, program), constraint)
            yield turn
        except BaseException as error:
            failure = type(error).__name__
            raise
        finally:
            turn.abort()
            turn.trace(failure or turn.failure)
            server.programs.leave_turn(node, failed=not turn.is_complete)


async def encoded(server: Server, request: TurnRequest, program: LiveProgram) -> tuple[int, ...]:
    """The prompt's ids. Raises `ApiError` 400 for one that the context cannot hold."""
    if isinstance(request.prompt, tuple):
        token_ids, param = request.prompt, "prompt"
    else:
        encoder = server.text_model()[1]
        if request.prompt is not None:
            encode, param = partial(encoder.encode_text, request.prompt), "prompt"
        else:
            messages, param = request.messages or (), "messages"
            encode = partial(encoder.encode, messages, request.tools, partial(server.programs.recorded.get, program.id))
        token_ids = await encode_beside(encode, request.num_characters)
    if not token_ids:
        raise invalid(f"{param}: there is nothing to go on from", param)
    max_context = server.engine.max_context
    if len(token_ids) >= max_context:
        text = f"{param}: these are {len(token_ids)} tokens; the context holds {max_context}, with one to generate"
        raise invalid(text, param, "context_length_exceeded")
    return token_ids


def ended_meanwhile() -> ApiError:
    """For a request whose program somebody ended."""
    return ApiError(409, "the program of this request was ended", code="program_ended")


async def whole(stream: CallStream) -> AsyncGenerator[TokensOut | CallFinished, None]:
    """What a call generates, and its end."""
    async for tokens in stream:
        yield tokens
    assert stream.finished is not None
    yield stream.finished
