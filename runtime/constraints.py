"""What a caller may give as the constraint of a completion, and the grammar's word for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from pydantic import BaseModel

from treadle.grammar import EBNF, Choice, Constraint, JSONSchema, Regex, ToolTurn
from treadle.runtime.errors import InvalidRequestError

ConstraintLike: TypeAlias = Constraint | Mapping[str, Any] | type[BaseModel]
"""A constraint of `treadle.grammar` (`Regex`, `Choice`, `EBNF`, `JSONSchema`), a JSON Schema, or a pydantic model."""


def constraint_from(given: ConstraintLike) -> Constraint:
    """The constraint that is meant. A schema is strict: a keyword that decoding cannot enforce will be refused by name.

    Raises `InvalidRequestError` for anything else.
    """
    if isinstance(given, JSONSchema | Regex | EBNF | Choice | ToolTurn):
        return given
    if isinstance(given, type) and issubclass(given, BaseModel):
        given = given.model_json_schema()
    if not isinstance(given, Mapping):
        raise InvalidRequestError(
            "a constraint is a JSON Schema, a pydantic model, or Regex, Choice, EBNF or JSONSchema of treadle.grammar; "
            f"this is a {type(given).__name__}"
        )
    try:
        return JSONSchema(json.dumps(dict(given), ensure_ascii=False), strict=True)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"the schema cannot be written as JSON: {error}") from error
