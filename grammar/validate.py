"""Validation of JSON against a schema: of tool arguments, and of what a grammar left open."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from treadle.grammar.preflight import SchemaDocument, escaped

MAX_ERRORS = 8
MAX_MESSAGE = 300


@dataclass(frozen=True, slots=True)
class Violation:
    """One keyword that a value does not satisfy. `pointer` is where in the value, `value` what stands there."""

    keyword: str
    pointer: str
    value: Any
    message: str

    def __str__(self) -> str:
        return f"at {self.pointer}: {self.message}" if self.pointer else self.message


class Validator:
    """Validates values against one schema, in its dialect; 2020-12 unless it states another.

    `format` is an annotation, and checked only if `formats` is set, as far as jsonschema knows the format. References
    are local ones only. Raises, for the schema, what `SchemaDocument` raises. Safe to share among threads.

    >>> Validator('{"properties": {"n": {"type": "integer"}}}').errors({"n": "x"})
    ["at /n: 'x' is not of type 'integer'"]
    """

    def __init__(self, schema: str, *, formats: bool = False) -> None:
        self._document = SchemaDocument(schema)
        self._formats = formats

    def errors(self, value: Any) -> list[str]:
        """One line for each of the first few errors, with the JSON pointer of the offending part. Empty if valid."""
        return [str(violation) for violation in islice(self.violations(value), MAX_ERRORS)]

    def violations(self, value: Any) -> Iterator[Violation]:
        """What the value does not satisfy, one after the other. None if it is valid."""
        for error in self._document.errors(value, formats=self._formats):
            place = "".join(f"/{escaped(str(part))}" for part in error.absolute_path)
            message = " ".join(error.message.split())
            if len(message) > MAX_MESSAGE:
                message = f"{message[:MAX_MESSAGE]}..."
            yield Violation(str(error.validator), place, error.instance, message)

    def text_errors(self, text: str) -> list[str]:
        """As `errors`, of JSON text; text that is no JSON is one error."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return [f"it is no JSON text: {error}"]
        return self.errors(value)
