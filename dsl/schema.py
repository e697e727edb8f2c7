"""Types as JSON Schema, and back: what a model must write, and how it is read."""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema

from treadle.dsl.errors import DSLError, OutputError
from treadle.dsl.var import Var


class OutputTypeError(DSLError, TypeError):
    """A type that a model cannot be asked to write."""


class PlainSchema(GenerateJsonSchema):
    """JSON Schema without the titles that only repeat the names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class OutputType:
    """The declared type of a call's value.

    Attributes:
        type: As annotated.
        schema: JSON Schema of what the model writes; None for text and for choices.
        choices: If the value is one of some strings: those.
        parse: Text to value; raises `OutputError`.
        check: Python value to value of the type; raises `OutputError`.
    """

    type: Any
    schema: dict[str, Any] | None
    choices: tuple[str, ...] | None
    parse: Callable[[str], Any]
    check: Callable[[Any], Any]


def output_type(annotation: Any, where: str) -> OutputType:
    """What a model must write for a type. `where` begins the message of `OutputTypeError`."""
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        schema = plain_schema(adapter.json_schema(schema_generator=PlainSchema))
    except (PydanticUserError, TypeError) as error:
        raise OutputTypeError(
            f"{where}: a model cannot write a {annotation!r}. Annotate a pydantic model, str, int, float, bool, "
            f"Literal, an enum, or a list or dict of these ({str(error).splitlines()[0]})"
        ) from error
    choices = _choices(annotation)

    def check(value: Any) -> Any:
        try:
            return adapter.validate_python(value)
        except ValidationError as error:
            raise OutputError(f"{where}: {explain(error)}") from error

    def parse(text: str) -> Any:
        try:
            return adapter.validate_json(text)
        except ValidationError as error:
            reason = f"the output does not fit {_name(annotation)}: {explain(error)}"
            raise OutputError(f"{where}: {reason}", reason) from error

    if annotation is str:
        return OutputType(str, None, None, str, check)
    if choices is not None:
        return OutputType(annotation, None, choices, lambda text: check(text.strip()), check)
    return OutputType(annotation, schema, None, parse, check)


def plain_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema without the titles of models, which only repeat their names."""
    plain = {key: item for key, item in schema.items() if key != "title"}
    if "$defs" in plain:
        plain["$defs"] = {name: plain_schema(item) for name, item in plain["$defs"].items()}
    return plain


def explain(error: ValidationError) -> str:
    """A validation error in one line that a person or a model can act on."""
    parts = []
    for detail in error.errors(include_url=False, include_context=False):
        where = ".".join(str(step) for step in detail["loc"])
        given = repr(detail["input"])
        shown = given if len(given) <= 60 else given[:57] + "..."
        got = "" if detail["type"] in ("missing", "extra_forbidden") else f" (got {shown})"
        parts.append(f"{where}: {detail['msg']}{got}" if where else f"{detail['msg']}{got}")
    return "; ".join(parts)


def without_vars(annotation: Any) -> Any:
    """A type with the variables taken out: `str` of `In[str]`."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    members = tuple(item for item in get_args(annotation) if item is not Var and get_origin(item) is not Var)
    return Union[members] if members else Any  # noqa: UP007


def _choices(annotation: Any) -> tuple[str, ...] | None:
    if get_origin(annotation) is Literal:
        values = get_args(annotation)
    elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        values = tuple(member.value for member in annotation)
    else:
        return None
    return values if all(isinstance(item, str) for item in values) else None


def _name(annotation: Any) -> str:
    return getattr(annotation, "__name__", None) or str(annotation)
