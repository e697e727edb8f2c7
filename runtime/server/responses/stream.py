"""A response as the sequence of server-sent events that the Responses API specifies.

created, in_progress
  output_item.added
    content_part.added, output_text.delta.., output_text.done, content_part.done     of a message
    function_call_arguments.delta.., function_call_arguments.done                    of a call
  output_item.done
completed | incomplete | failed
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from treadle.runtime.server.errors import ApiError
from treadle.runtime.server.responses.items import Change, Closed, Grew, MessageItem, Opened
from treadle.runtime.server.responses.response import Response
from treadle.runtime.server.turn import TurnEvent

StreamEvent: TypeAlias = dict[str, Any]


class ResponseStream:
    """Feeds a turn's events into a response, and tells what happens to it as numbered events."""

    def __init__(self, response: Response) -> None:
        self._response = response
        self._next = 0

    def begin(self) -> Iterator[StreamEvent]:
        """The events before the first token."""
        yield self._lifecycle("created")
        yield self._lifecycle("in_progress")

    def take(self, event: TurnEvent) -> Iterator[StreamEvent]:
        """The events that follow from one of the turn, the last ones of the stream if it is `TurnFinished`."""
        for change in self._response.take(event):
            yield from self._changed(change)
        if self._response.status != "in_progress":
            yield self._lifecycle(self._response.status)

    def fail(self, error: ApiError) -> Iterator[StreamEvent]:
        """The last events of a response that cannot be completed."""
        for change in self._response.fail(error):
            yield from self._changed(change)
        yield self._lifecycle("failed")

    def _changed(self, change: Change) -> Iterator[StreamEvent]:
        item, index = change.item, change.index
        place = {"item_id": item.id, "output_index": index}
        in_part = {**place, "content_index": 0}
        is_message = isinstance(item, MessageItem)
        match change:
            case Opened():
                yield self._event("output_item.added", output_index=index, item=item.to_json())
                if isinstance(item, MessageItem):
                    yield self._event("content_part.added", **in_part, part=item.part())
            case Grew() if is_message:
                yield self._event("output_text.delta", **in_part, delta=change.text, logprobs=list(change.logprobs))
            case Grew():
                yield self._event("function_call_arguments.delta", **place, delta=change.text)
            case Closed():
                if isinstance(item, MessageItem):
                    part = item.part()
                    logprobs = part["logprobs"]
                    yield self._event("output_text.done", **in_part, text=part["text"], logprobs=logprobs)
                    yield self._event("content_part.done", **in_part, part=part)
                else:
                    done = {"name": item.name, "arguments": item.arguments}
                    yield self._event("function_call_arguments.done", **place, **done)
                yield self._event("output_item.done", output_index=index, item=item.to_json())

    def _lifecycle(self, name: str) -> StreamEvent:
        return self._event(name, response=self._response.to_json())

    def _event(self, kind: str, /, **fields: Any) -> StreamEvent:
        event = {"type": f"response.{kind}", "sequence_number": self._next, **fields}
        self._next += 1
        return event
