"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from treadle.runtime.server.answers import json_answer
from treadle.runtime.server.chat_answers import ChatAnswer, ChatCompletion
from treadle.runtime.server.chat_requests import ChatRequest, answer_of, choice_of, message_of, specs_of
from treadle.runtime.server.context import PROGRAM_ID, SERVER, TENANT, Server
from treadle.runtime.server.errors import invalid
from treadle.runtime.server.identity import Identity, identify
from treadle.runtime.server.limits import check_conversation, read_as
from treadle.runtime.server.requests import checked_max_tokens, checked_n, sampling_params, validated
from treadle.runtime.server.routes import Route
from treadle.runtime.server.sse import EventStream
from treadle.runtime.server.turn import Turn, TurnRequest, run_turn


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Goes on with a conversation."""
    server = request.app[SERVER]

    def asked(body: dict[str, Any]) -> tuple[ChatRequest, TurnRequest, Identity]:
        given = validated(body, ChatRequest)
        return given, turn_request_of(server, given), identify(request.headers, body)

    given, wanted, identity = await read_as(request, server.config, asked)
    async with run_turn(server, request[TENANT], identity, wanted) as turn:
        request[PROGRAM_ID] = turn.program.public_id
        answer = ChatAnswer(
            server.text_model()[0],
            {"created": int(time.time()), "model": given.model}
            | ({"service_tier": "default"} if given.service_tier else {}),
            n=wanted.n,
            with_logprobs=bool(given.logprobs),
            with_usage=given.stream_options is not None and bool(given.stream_options.include_usage),
        )
        if given.stream:
            return await _streamed(request, turn, answer)
        async for event in turn.events():
            answer.take(event)
        return json_answer(answer.whole(turn.usage))


async def _streamed(request: web.Request, turn: Turn, answer: ChatAnswer) -> web.StreamResponse:
    async with EventStream(request, request.app[SERVER].config) as stream:
        for chunk in answer.first_chunks():
            await stream.send(chunk)
        async for event in turn.events():
            await stream.send(answer.chunk(event))
        if answer.with_usage:
            await stream.send(answer.usage_chunk(turn.usage))
        await stream.done()
    return stream.response


def turn_request_of(server: Server, given: ChatRequest) -> TurnRequest:
    """What the request wants of the model. Raises `ApiError` for what the server cannot do."""
    server.check_model(given.model)
    tokenizer, _ = server.text_model()
    if given.top_logprobs and not given.logprobs:
        raise invalid("top_logprobs: set logprobs to true to have them", "top_logprobs")
    if given.stream_options is not None and not given.stream:
        raise invalid("stream_options: they are for streams; set stream to true", "stream_options")
    messages = [message_of(message) for message in given.messages]
    tools = specs_of(given.tools or ())
    check_conversation(messages, server.config, tools=tools)
    mode, names = choice_of(given, tools)
    limits = [
        limit
        for param in ("max_completion_tokens", "max_tokens")
        if (limit := checked_max_tokens(getattr(given, param), server, param)) is not None
    ]
    return TurnRequest(
        messages=messages,
        tools=tools,
        callable_tools=names,
        tool_mode=mode,
        parallel=given.parallel_tool_calls is not False,
        strict_tools=frozenset(tool.function.name for tool in given.tools or () if tool.function.strict),
        answer=answer_of(given),
        sampling=sampling_params(
            given,
            vocab_size=server.engine.vocab_size,
            stop_token_ids=tokenizer.eos_token_ids,
            logprobs=(given.top_logprobs or 0) if given.logprobs else None,
        ),
        max_tokens=min(limits, default=None),
        n=checked_n(given.n, server),
        name="chat",
    )


ROUTES = (
    Route(
        "POST",
        "/v1/chat/completions",
        chat_completions,
        "Go on with a conversation",
        body=ChatRequest,
        answer=ChatCompletion,
        streams=True,
    ),
)
