"""One turn of a model, whichever endpoint asked for it: a `TurnRequest` in, events out."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from treadle.grammar import Constraint, JSONSchema, ToolSpec, ToolTurn, constraint_to_json
from treadle.runtime.engine.session import CallStream
from treadle.runtime.server.context import Server
from treadle.runtime.server.errors import ApiError, invalid
from treadle.runtime.server.tool_pieces import ArgumentPiece, CallBegun, ContentPiece, ToolPieces
from treadle.scheduler import SamplingParams, SubmitCall, TokenLogprob, TokensOut

TurnReason: TypeAlias = Literal["stop", "length", "tool_calls", "aborted"]


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
    n: int = 1
    name: str = "turn"


@dataclass(frozen=True, slots=True)
class TurnUsage:
    """Tokens of a turn. The prompt counts once, however many answers it has; `cached` is what was not computed."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of one answer. `logprobs` are of the tokens whose text ends here, if they were asked for."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


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


@contextlib.asynccontextmanager
async def run_turn(server: Server, tenant: Tenant, identity: Identity, request: TurnRequest) -> AsyncIterator[Turn]:
    """Submits the calls of a turn. Leaving the scope aborts those that have not ended."""
