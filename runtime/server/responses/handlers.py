"""`/v1/responses`: make one, whole or as a stream; go on from one, read it again, forget it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeAlias

from aiohttp import web

from treadle.runtime.errors import TreadleError
from treadle.runtime.server.answers import json_answer
from treadle.runtime.server.context import PROGRAM_ID, SERVER, TENANT
from treadle.runtime.server.errors import ApiError, api_error_of, invalid, not_found
from treadle.runtime.server.identity import identify
from treadle.runtime.server.limits import check_conversation, check_count, read_as
from treadle.runtime.server.logprobs import token_entries
from treadle.runtime.server.requests import validated
from treadle.runtime.server.responses.asked import fields_renamed, repeated, turn_of, wants_logprobs
from treadle.runtime.server.responses.messages import messages_of
from treadle.runtime.server.responses.requests import ResponseRequest
from treadle.runtime.server.responses.response import DeletedResponse, Response, ResponseObject
from treadle.runtime.server.responses.store import RESPONSES, Item, ResponseStore, StoredResponse
from treadle.runtime.server.responses.stream import ResponseStream
from treadle.runtime.server.routes import Route
from treadle.runtime.server.sse import EventStream
from treadle.runtime.server.tenants import Tenant
from treadle.runtime.server.turn import Turn, run_turn

Keep: TypeAlias = Callable[[Response], None]


async def create_response(request: web.Request) -> web.StreamResponse:
    """Makes a response. Once it has ended it is stored, unless `store` is false."""
    server, store, tenant = request.app[SERVER], request.app[RESPONSES], request[TENANT]
    body, asked, items_given = await read_as(request, server.config, _asked)
    server.check_model(asked.model)
    tokenizer, _ = server.text_model()
    previous = _previous(store, tenant, asked.previous_response_id)
    given = tuple(_resolved(store, tenant, items_given))
    items = [*(previous.history.all_items() if previous is not None else ()), *given]
    if not items:
        raise invalid("input: there is nothing to answer", "input")
    check_count(items, server.config, "input")
    messages = messages_of(items, asked.instructions)
    wanted = turn_of(server, asked, messages)
    check_conversation(messages, server.config, "input", wanted.tools)
    identity = identify(request.headers, body, continues=previous.program_id if previous is not None else None)
    with fields_renamed():
        async with run_turn(server, tenant, identity, wanted) as turn:
            program_id = request[PROGRAM_ID] = turn.program.public_id

            def keep(response: Response) -> None:
                if asked.store is not False:
                    store.put(tenant.name, StoredResponse.after(previous, given, response.to_json(), program_id))

            response = Response(repeated(asked), partial(token_entries, tokenizer) if wants_logprobs(asked) else None)
            if asked.stream:
                return await _stream(request, turn, response, keep)
            async for event in turn.events():
                for _ in response.take(event):
                    pass
            keep(response)
            return json_answer(response.to_json())


async def get_response(request: web.Request) -> web.StreamResponse:
    """A stored response."""
    if request.query.get("stream") == "true":
        raise invalid("stream: not supported: what is stored has ended; read it whole", "stream")
    response_id = request.match_info["response_id"]
    found = request.app[RESPONSES].get(request[TENANT].name, response_id)
    if found is None:
        raise _no_response(response_id)
    return json_answer(found.body)


async def delete_response(request: web.Request) -> web.StreamResponse:
    """Forgets a stored response."""
    response_id = request.match_info["response_id"]
    if not request.app[RESPONSES].delete(request[TENANT].name, response_id):
        raise _no_response(response_id)
    return json_answer({"id": response_id, "object": "response", "deleted": True})


def _previous(store: ResponseStore, tenant: Tenant, response_id: str | None) -> StoredResponse | None:
    if response_id is None:
        return None
    found = store.get(tenant.name, response_id)
    if found is None:
        text = f"previous_response_id: no response {response_id!r} is stored; send the whole conversation as input"
        raise invalid(text, "previous_response_id", "previous_response_not_found")
    return found


def _asked(body: dict[str, Any]) -> tuple[dict[str, Any], ResponseRequest, list[Item]]:
    """A body, the request that it is, and the items of its input."""
    asked = validated(body, ResponseRequest)
    if isinstance(asked.input, str):
        items = [{"type": "message", "role": "user", "content": asked.input}] if asked.input else []
    else:
        items = [item.model_dump(exclude_none=True) for item in asked.input]
    return body, asked, items


def _resolved(store: ResponseStore, tenant: Tenant, items: Iterable[Item]) -> Iterator[Item]:
    """The items of a request that a model can read, with those in place that it only names."""
    for index, item in enumerate(items):
        if item["type"] == "item_reference":
            found = store.item(tenant.name, item["id"])
            if found is None:
                raise not_found(f"input[{index}].id: no item {item['id']!r} is stored", f"input[{index}].id")
            yield found
        elif item["type"] != "reasoning":
            yield item


async def _stream(request: web.Request, turn: Turn, response: Response, keep: Keep) -> web.StreamResponse:
    events = ResponseStream(response)
    async with EventStream(request, request.app[SERVER].config) as stream:
        for event in events.begin():
            await stream.send(event, event["type"])
        try:
            async for told in turn.events():
                ready = list(events.take(told))
                if response.status != "in_progress":
                    keep(response)  # before the client hears that it is complete, and goes on from it
                for event in ready:
                    await stream.send(event, event["type"])
        except (ApiError, TreadleError) as error:
            for event in events.fail(api_error_of(error)):
                await stream.send(event, event["type"])
    return stream.response


def _no_response(response_id: str) -> ApiError:
    return not_found(f"no response {response_id!r} is stored", "response_id")


PATH = "/v1/responses/{response_id}"
ROUTES = (
    Route(
        "POST",
        "/v1/responses",
        create_response,
        "Make a response",
        body=ResponseRequest,
        answer=ResponseObject,
        streams=True,
        errors=(404,),
    ),
    Route("GET", PATH, get_response, "A stored response", answer=ResponseObject, errors=(404,)),
    Route("DELETE", PATH, delete_response, "Forget a stored response", answer=DeletedResponse, errors=(404,)),
)
