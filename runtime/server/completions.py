"""`POST /v1/completions`: going on from plain text or token ids, as it was before there was chat."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, TypeAlias

from aiohttp import web
from pydantic import Discriminator, Field, Tag

from treadle.runtime.server.answers import json_answer
from treadle.runtime.server.completion_answers import Completion, CompletionAnswer
from treadle.runtime.server.context import PROGRAM_ID, SERVER, TENANT, Server
from treadle.runtime.server.errors import invalid
from treadle.runtime.server.identity import Identity, identify
from treadle.runtime.server.limits import check_characters, read_as
from treadle.runtime.server.merge import merged
from treadle.runtime.server.requests import (
    Label,
    Many,
    SamplingFields,
    StreamOptions,
    checked_max_tokens,
    checked_n,
    refused,
    sampling_params,
    validated,
)
from treadle.runtime.server.routes import Route
from treadle.runtime.server.sse import EventStream
from treadle.runtime.server.turn import Turn, TurnEvent, TurnRequest, run_turn

DEFAULT_MAX_TOKENS = 16
"""As OpenAI has it."""
MAX_LOGPROBS = 20
MAX_PROMPTS = 128

MAX_TOKEN_IDS = 1 << 20
"""Of one prompt, whatever the context holds."""


def _form(prompt: Any) -> str:
    """What a prompt is, by its first item."""
    if not isinstance(prompt, list):
        return "<text>"
    first = prompt[0] if prompt else None
    return "<texts>" if isinstance(first, str) else "<lists>" if isinstance(first, list) else "<token ids>"


TokenIds: TypeAlias = Annotated[Many[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_TOKEN_IDS)]
Prompt: TypeAlias = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[TokenIds, Tag("<token ids>")]
    | Annotated[Many[str], Field(max_length=MAX_PROMPTS), Tag("<texts>")]
    | Annotated[Many[TokenIds], Field(max_length=MAX_PROMPTS), Tag("<lists>")],
    Discriminator(_form),
]


class CompletionRequest(SamplingFields):
    """One prompt or several, as text or as token ids, and how to go on with each.

    With `return_token_ids`, which other servers know too, each choice has the ids that were generated.
    """

    model: str
    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    user: Label | None = None
    suffix: Annotated[str, refused("this model goes on; it does not fill in")] | None = None


async def completions(request: web.Request) -> web.StreamResponse:
    """Goes on with each prompt, all at once."""
    server = request.app[SERVER]

    def asked(body: dict[str, Any]) -> tuple[CompletionRequest, list[TurnRequest], Identity]:
        given = validated(body, CompletionRequest)
        return given, turn_requests_of(server, given), identify(request.headers, body)

    given, wanted, identity = await read_as(request, server.config, asked)
    async with contextlib.AsyncExitStack() as stack:
        turns = [await stack.enter_async_context(run_turn(server, request[TENANT], identity, each)) for each in wanted]
        request[PROGRAM_ID] = turns[0].program.public_id
        answer = CompletionAnswer(
            server.tokenizer,
            given.model,
            [_echoed(server, each.prompt) if given.echo else "" for each in wanted for _ in range(each.n)],
            with_logprobs=given.logprobs is not None,
            with_usage=given.stream_options is not None and bool(given.stream_options.include_usage),
        )
        if given.stream:
            return await _streamed(request, turns, answer)
        async with contextlib.aclosing(_events(turns)) as events:
            async for first, event in events:
                answer.take(first, event)
        return json_answer(answer.whole([turn.usage for turn in turns]))


async def _streamed(request: web.Request, turns: Sequence[Turn], answer: CompletionAnswer) -> web.StreamResponse:
    async with EventStream(request, request.app[SERVER].config) as stream:
        for chunk in answer.first_chunks():
            await stream.send(chunk)
        async with contextlib.aclosing(_events(turns)) as events:
            async for first, event in events:
                await stream.send(answer.chunk(first, event))
        if answer.with_usage:
            await stream.send(answer.usage_chunk([turn.usage for turn in turns]))
        await stream.done()
    return stream.response


def turn_requests_of(server: Server, given: CompletionRequest) -> list[TurnRequest]:
    """A turn for each prompt. Raises `ApiError` for what the server cannot do."""
    server.check_model(given.model)
    prompts = _prompts(server, given.prompt)
    n = checked_n(given.n, server)
    if given.best_of is not None and given.best_of != n:
        raise invalid("best_of: not supported: it must equal n", "best_of")
    if given.echo and given.logprobs is not None:
        raise invalid("logprobs: not supported with echo: prompts have none", "logprobs")
    if given.stream_options is not None and not given.stream:
        raise invalid("stream_options: they are for streams; set stream to true", "stream_options")
    sampling = sampling_params(
        given,
        vocab_size=server.engine.vocab_size,
        stop_token_ids=server.tokenizer.eos_token_ids if server.tokenizer is not None else (),
        logprobs=given.logprobs,
    )
    max_tokens = checked_max_tokens(given.max_tokens or DEFAULT_MAX_TOKENS, server)
    return [
        TurnRequest(
            prompt=prompt,
            sampling=sampling,
            max_tokens=max_tokens,
            with_token_ids=bool(given.return_token_ids),
            n=n,
            name="completion",
        )
        for prompt in prompts
    ]


def _prompts(server: Server, given: str | list[int] | list[str] | list[list[int]]) -> list[str | tuple[int, ...]]:
    """Each prompt: text, or token ids of the model."""
    if isinstance(given, str) or isinstance(given[0], str):
        check_characters(given, server.config, "prompt")
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        given = [given]
    prompts = [each if isinstance(each, str) else tuple(each) for each in given]
    for prompt in prompts:
        if isinstance(prompt, tuple) and max(prompt) >= server.engine.vocab_size:
            raise invalid(f"prompt: token ids lie in 0 .. {server.engine.vocab_size - 1}", "prompt")
    return prompts


def _echoed(server: Server, prompt: str | tuple[int, ...] | None) -> str:
    if isinstance(prompt, tuple):
        return server.tokenizer.decode(prompt) if server.tokenizer is not None else ""
    return prompt or ""


async def _events(turns: Sequence[Turn]) -> AsyncGenerator[tuple[int, TurnEvent], None]:
    """The events of several turns as they come, each with the place of its turn's first answer."""
    async with contextlib.aclosing(merged([turn.events() for turn in turns])) as events:
        async for place, event in events:
            yield sum(turn.n for turn in turns[:place]), event


ROUTES = (
    Route(
        "POST",
        "/v1/completions",
        completions,
        "Go on with plain text",
        body=CompletionRequest,
        answer=Completion,
        streams=True,
    ),
)
