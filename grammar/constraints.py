"""What a caller may ask of the text that a model writes: plain values, and their one wire form."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from treadle.grammar.errors import InvalidGrammarError


@dataclass(frozen=True, slots=True)
class JSONSchema:
    """Compact JSON that satisfies a schema. `schema` is JSON text: the order of its keys is the order of the output.

    With `strict`, a keyword that cannot be guaranteed while generating is refused; without, it is listed in
    `Grammar.unenforced`, to be validated afterwards.
    """

    schema: str
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Regex:
    """Text that a regular expression matches as a whole."""

    pattern: str


@dataclass(frozen=True, slots=True)
class EBNF:
    """Text of a context-free grammar in GBNF, its start rule named `root`."""

    grammar: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Exactly one of the options."""

    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool that the model may call. `parameters` is the JSON text of the schema of its arguments."""

    name: str
    description: str = ""
    parameters: str = '{"type":"object","properties":{}}'


@dataclass(frozen=True, slots=True)
class ToolTurn:
    """A turn in which the model may call tools, in Hermes form.

    With mode "auto" it writes free text or calls; with "required" one or more calls and nothing else. `answer` replaces
    the free text of "auto" by JSON that satisfies a schema: the turn is then calls, or that JSON. Without `parallel`
    there is at most one call.
    """

    tools: tuple[ToolSpec, ...]
    mode: Literal["auto", "required"] = "auto"
    answer: JSONSchema | None = None
    parallel: bool = True


Constraint = JSONSchema | Regex | EBNF | Choice | ToolTurn

_KINDS: dict[str, type[Constraint]] = {
    "json_schema": JSONSchema,
    "regex": Regex,
    "ebnf": EBNF,
    "choice": Choice,
    "tool_turn": ToolTurn,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def constraint_to_json(constraint: Constraint) -> str:
    """The canonical wire text: equal constraints have equal texts, so that it serves as a cache key too."""
    fields = {"kind": _NAMES[type(constraint)], **asdict(constraint)}
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def constraint_from_json(text: str) -> Constraint:
    """Reads `constraint_to_json`'s text. Raises `InvalidGrammarError` for anything else."""
    try:
        fields = json.loads(text)
        kind = _KINDS[fields.pop("kind")]
        return _read(kind, fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidGrammarError(
            f"the constraint's wire text cannot be read ({error}). Write it with constraint_to_json."
        ) from error


def _read(kind: type[Constraint], fields: dict[str, Any]) -> Constraint:
    if kind is Choice:
        return Choice(_texts(fields.pop("options"), **fields))
    if kind is ToolTurn:
        tools = tuple(_tool(tool) for tool in fields.pop("tools"))
        answer = fields.pop("answer", None)
        mode = fields.pop("mode", "auto")
        if mode not in ("auto", "required"):
            raise ValueError(f"mode {mode!r} is neither auto nor required")
        parallel = _flag(fields.pop("parallel", True), **fields)
        return ToolTurn(tools, mode, None if answer is None else _schema(answer), parallel)
    if kind is JSONSchema:
        return _schema(fields)
    if kind is Regex:
        return Regex(*_texts([fields.pop("pattern")], **fields))
    return EBNF(*_texts([fields.pop("grammar")], **fields))


def _tool(fields: dict[str, Any]) -> ToolSpec:
    name, description, parameters = _texts([fields.pop("name"), fields.pop("description"), fields.pop("parameters")])
    _flag(True, **fields)
    return ToolSpec(name, description, parameters)


def _schema(fields: dict[str, Any]) -> JSONSchema:
    (schema,) = _texts([fields.pop("schema")])
    return JSONSchema(schema, _flag(fields.pop("strict", False), **fields))


def _texts(values: list[Any], **unknown: Any) -> tuple[str, ...]:
    if unknown or not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"unknown fields {sorted(unknown)}" if unknown else "text was expected")
    return tuple(values)


def _flag(value: object, **unknown: Any) -> bool:
    if unknown or not isinstance(value, bool):
        raise ValueError(f"unknown fields {sorted(unknown)}" if unknown else "true or false was expected")
    return value
