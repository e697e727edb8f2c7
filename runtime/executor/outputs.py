"""What the grammar of a call leaves open is validated when the output is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from treadle.dsl.errors import SchemaViolation
from treadle.dsl.node import CallNode
from treadle.dsl.turn import ChatNode
from treadle.grammar.tool_text import OPEN
from treadle.grammar.validate import Validator, Violation

DEFAULT_RETRIES = 2
"""Of a call with keywords that its grammar does not enforce, if nobody said how many."""


class OutputCheck:
    """Turns the text of a call into its value, if it satisfies its whole schema.

    Args:
        unenforced: Pointers of the keywords that the call's grammar does not guarantee.

    Attributes:
        retries: How often to ask again.
        is_final: Whether what is generated will be the value's text, so that it may be passed on as it comes.
    """

    def __init__(self, node: CallNode, unenforced: Sequence[str]) -> None:
        tools = [f"/tools/{index}/" for index in range(len(node.options.tools))]
        is_open = any(not pointer.startswith(tuple(tools)) for pointer in unenforced)
        self._node = node
        self._validator = Validator(json.dumps(node.output_schema), formats=True) if is_open else None
        self._tools = {
            tool.name: Validator(json.dumps(tool.parameters), formats=True)
            for tool, place in zip(node.options.tools, tools, strict=True)
            if any(pointer.startswith(place) for pointer in unenforced)
        }
        default = DEFAULT_RETRIES if is_open else 0
        self.retries = default if node.options.retries is None else node.options.retries
        self.is_final = not self.retries or (node.output_schema is None and node.output_choices is None)

    def value(self, text: str) -> Any:
        """The value of what the model wrote. Raises `SchemaViolation`, or another `OutputError`."""
        if self._validator is not None and not (isinstance(self._node, ChatNode) and self._node.calls):
            self._validate(self._validator, text)
        return self._node.parse(text)

    def must_be_whole(self, text: str) -> bool:
        """Whether a text that was cut off is of no use: that of a typed value, or one that ends in a tool call."""
        is_text = self._node.output_schema is None and self._node.output_choices is None
        return not is_text or (bool(self._node.options.tools) and OPEN in text)

    def wrong_arguments(self, name: str, arguments: str) -> str | None:
        """What is wrong with the arguments of a tool call, as far as its grammar left that open."""
        found = _violation(self._tools[name], arguments) if name in self._tools else None
        return None if found is None else _reason(found)

    def _validate(self, validator: Validator, text: str) -> None:
        found = _violation(validator, text)
        if found is None:
            return
        reason = _reason(found)
        fix = "Give more retries, a larger model, or a type that decoding can enforce (strict=True says what it cannot)"
        raise SchemaViolation(f"{self._node}: {reason}. {fix}", reason, found.keyword, found.pointer, found.value)


def _violation(validator: Validator, text: str) -> Violation | None:
    """What a text does not satisfy first; None for one that is no JSON, whose reader says why."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return next(validator.violations(value), None)


def _reason(found: Violation) -> str:
    return f"{found.keyword!r} at {found.pointer or 'the root'} does not hold: {found.message}"
