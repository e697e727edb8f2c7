"""Validation of JSON against a schema: of tool arguments, and of what a grammar left open."""

from __future__ import annotations

import json
from typing import Any

from treadle.grammar.preflight import SchemaDocument, escaped

MAX_ERRORS = 8
MAX_MESSAGE = 300


class Validator:
    """Validates values against one schema, in its dialect; 2020-12 unless it states another.

    `format` is not checked: it is an annotation. References are local ones only. Raises, for the schema, what
    `SchemaDocument` raises. Safe to share among threads.

    >>> Validator('{"properties": {"n": {"type": "integer"}}}').errors({"n": "x"})
    ["at /n: 'x' is not of type 'integer'"]
    """

    def __init__(self, schema: str) -> None:
        self._document = SchemaDocument(schema)

    def errors(self, value: Any) -> list[str]:
        """One line for each of the first few errors, with the JSON pointer of the offending part. Empty if valid."""
        lines = []
        for error in self._document.errors(value):
            place = "".join(f"/{escaped(str(part))}" for part in error.absolute_path)
            message = " ".join(error.message.split())
            if len(message) > MAX_MESSAGE:
                message = f"{message[:MAX_MESSAGE]}..."
            lines.append(f"at {place}: {message}" if place else message)
            if len(lines) == MAX_ERRORS:
                break
        return lines

    def text_errors(self, text: str) -> list[str]:
        """As `errors`, of JSON text; text that is no JSON is one error."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return [f"it is no JSON text: {error}"]
        return self.errors(value)
