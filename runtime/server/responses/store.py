"""Responses that clients may come back to: by `previous_response_id`, `item_reference`, GET and DELETE."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from aiohttp import web

MAX_RESPONSES = 4_096
MAX_BYTES = 64 * 2**20
IDLE_S = 3_600.0

Item: TypeAlias = dict[str, Any]
"""An input or output item, as clients write and read it."""


@dataclass(frozen=True, slots=True)
class History:
    """A conversation, told by its last turn and the history before that one. Turns are shared, never copied."""

    before: History | None
    items: tuple[Item, ...]

    def all_items(self) -> list[Item]:
        """The items of all turns, the oldest first."""
        turns: list[tuple[Item, ...]] = []
        here: History | None = self
        while here is not None:
            turns.append(here.items)
            here = here.before
        return [item for turn in reversed(turns) for item in turn]


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response that has ended, with what is needed to go on from it.

    `num_bytes`, counted in JSON, is an upper bound of what it keeps alive: the history before it is counted here too,
    though others may share it.
    """

    body: dict[str, Any]
    history: History
    program_id: str
    num_bytes: int

    @classmethod
    def after(
        cls, previous: StoredResponse | None, given: tuple[Item, ...], body: dict[str, Any], program_id: str
    ) -> StoredResponse:
        """The response `body` to the items `given`, which came after those of `previous`."""
        history = History(previous.history if previous is not None else None, (*given, *body["output"]))
        own = len(json.dumps([given, body]))
        return cls(body, history, program_id, own + (previous.num_bytes if previous is not None else 0))

    @property
    def id(self) -> str:
        return str(self.body["id"])


@dataclass(slots=True)
class _Shelf:
    """One tenant's responses, that used last at the end."""

    responses: OrderedDict[str, tuple[StoredResponse, float]] = field(default_factory=OrderedDict)
    outputs: dict[str, Item] = field(default_factory=dict)
    num_bytes: int = 0


class ResponseStore:
    """Keeps the responses of each tenant apart, and for each only so many, so large and for so long.

    Beyond a bound, what was not used for longest goes. A response goes on from its history even when the responses
    before it are gone.
    """

    def __init__(
        self,
        *,
        max_responses: int = MAX_RESPONSES,
        max_bytes: int = MAX_BYTES,
        idle_s: float = IDLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._idle_s = idle_s
        self._clock = clock
        self._shelves: dict[str, _Shelf] = {}

    def put(self, tenant: str, response: StoredResponse) -> None:
        """Keeps a response. One that is larger than all there may be is not kept."""
        shelf = self._shelves.setdefault(tenant, _Shelf())
        shelf.responses[response.id] = (response, self._clock())
        shelf.outputs.update({item["id"]: item for item in response.body["output"]})
        shelf.num_bytes += response.num_bytes
        self._trim(shelf)

    def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """The response, if this tenant has one of this id. It counts as used."""
        shelf = self._trimmed(tenant)
        found = shelf.responses.get(response_id)
        if found is None:
            return None
        shelf.responses[response_id] = (found[0], self._clock())
        shelf.responses.move_to_end(response_id)
        return found[0]

    def item(self, tenant: str, item_id: str) -> Item | None:
        """An output item of a response that is kept, by its own id."""
        return self._trimmed(tenant).outputs.get(item_id)

    def delete(self, tenant: str, response_id: str) -> bool:
        """Forgets a response; whether there was one."""
        shelf = self._trimmed(tenant)
        if response_id not in shelf.responses:
            return False
        self._remove(shelf, response_id)
        return True

    def _trimmed(self, tenant: str) -> _Shelf:
        shelf = self._shelves.get(tenant)
        if shelf is None:
            return _Shelf()
        self._trim(shelf)
        return shelf

    def _trim(self, shelf: _Shelf) -> None:
        oldest_allowed = self._clock() - self._idle_s
        while shelf.responses:
            response_id, (_, used) = next(iter(shelf.responses.items()))
            is_full = len(shelf.responses) > self._max_responses or shelf.num_bytes > self._max_bytes
            if not is_full and used >= oldest_allowed:
                return
            self._remove(shelf, response_id)

    def _remove(self, shelf: _Shelf, response_id: str) -> None:
        response, _ = shelf.responses.pop(response_id)
        shelf.num_bytes -= response.num_bytes
        for item in response.body["output"]:
            del shelf.outputs[item["id"]]


RESPONSES: web.AppKey[ResponseStore] = web.AppKey("responses", ResponseStore)
