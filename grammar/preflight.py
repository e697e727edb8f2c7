"""A JSON Schema before it is compiled: is it one, is it within bounds, and what do its references mean."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from treadle.grammar.errors import (
    GrammarTooLargeError,
    InvalidGrammarError,
    InvalidSchemaError,
    UnsupportedSchemaError,
)
from treadle.grammar.matching import check_pattern, is_found

if TYPE_CHECKING:
    from jsonschema import ValidationError
    from jsonschema.protocols import Validator as Backend

MAX_TEXT = 256 << 10
MAX_DEPTH = 64
MAX_PROPERTIES = 5_000
MAX_ENUM_VALUES = 2_000

# The branches of these are schemas by name, by position, or single ones.
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = (
    "items",
    "additionalItems",
    "additionalProperties",
    "unevaluatedItems",
    "unevaluatedProperties",
    "propertyNames",
    "contains",
    "not",
    "if",
    "then",
    "else",
)
_UNRESOLVABLE = ("$dynamicRef", "$recursiveRef")

Schema = dict[str, Any] | bool

# Where every document offers the schemas of all strings and of all objects. No other pointer looks like these.
TYPE_POINTERS = {"string": "string", "object": "object"}


def check_text(text: str, what: str) -> str:
    """`text`, if it is short enough and valid Unicode. Raises `GrammarTooLargeError` or `InvalidGrammarError`."""
    if len(text) > MAX_TEXT:
        raise GrammarTooLargeError(f"characters of {what}", len(text), MAX_TEXT)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidGrammarError(f"{what} has a lone surrogate, which is no character. Remove it.") from None
    return text


class SchemaDocument:
    """The schema of one constraint, checked: valid under its meta-schema, within bounds, all references local.

    Raises `InvalidSchemaError`, `UnsupportedSchemaError` or `GrammarTooLargeError`, each naming the place. A schema
    that does not state a known dialect is read as 2020-12 if it is valid there, else as draft 7, else as draft 4.
    """

    root: Schema

    def __init__(self, text: str) -> None:
        if len(text) > MAX_TEXT:
            raise GrammarTooLargeError("characters of the schema", len(text), MAX_TEXT)
        try:
            self.root = json.loads(text, parse_constant=_refuse_constant)
            json.dumps(self.root, ensure_ascii=False).encode()
        except RecursionError:
            raise GrammarTooLargeError("nested levels of the schema", MAX_DEPTH + 1, MAX_DEPTH) from None
        except ValueError as error:
            raise InvalidSchemaError("", f"it is no JSON text ({error}). Send the schema as JSON.") from error
        _check_depth(self.root)
        self._found: dict[str, Schema] = {}
        self._dialect = _dialect(self.root)
        self._check_bounds()

    def at(self, pointer: str) -> Schema:
        """The schema at a JSON pointer."""
        found = self._found.get(pointer)
        if found is None:
            found = self._found[pointer] = self._look_up(pointer)
        return found

    def target(self, pointer: str, reference: str) -> str:
        """The JSON pointer that the `$ref` of the schema at `pointer` names."""
        if not reference.startswith("#/") and reference != "#":
            raise UnsupportedSchemaError(
                "$ref", f"{pointer}/$ref", f"Only references within the schema, as '#/$defs/x', are; not {reference!r}."
            )
        target = unquote(reference[1:])
        try:
            self.at(target)
        except (KeyError, IndexError, ValueError):
            raise InvalidSchemaError(f"{pointer}/$ref", f"{reference!r} names no schema here. Define it.") from None
        return target

    def is_valid(self, pointer: str, value: object, without: str = "") -> bool:
        """Whether the schema at `pointer`, but for the keyword `without`, admits a value.

        Raises `InvalidSchemaError` for endless references.
        """
        schema = self.at(pointer)
        if isinstance(schema, dict) and without:
            schema = {keyword: content for keyword, content in schema.items() if keyword != without}
        try:
            return bool(self._validator.evolve(schema=schema).is_valid(value))
        except RecursionError:
            raise InvalidSchemaError(pointer, "its references go round in a circle. Break it.") from None

    def errors(self, value: object, *, formats: bool = False) -> Iterator[ValidationError]:
        """What is wrong with a value. Raises `InvalidSchemaError` for endless references."""
        checker = self._dialect.FORMAT_CHECKER if formats else None
        try:
            yield from self._validator.evolve(format_checker=checker).iter_errors(value)
        except RecursionError:
            raise InvalidSchemaError("", "its references go round in a circle. Break it.") from None

    @cached_property
    def _validator(self) -> Backend:
        import jsonschema
        import referencing

        extend: Any = jsonschema.validators.extend
        bounded = extend(self._dialect, {"pattern": _pattern_errors})
        validator: Backend = bounded(self.root, registry=referencing.Registry())
        return validator

    def _look_up(self, pointer: str) -> Schema:
        if pointer in TYPE_POINTERS.values():
            return {"type": pointer}
        node: Any = self.root
        for part in pointer.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            node = node[int(part)] if isinstance(node, list) else node[part]
        if not isinstance(node, (dict, bool)):
            raise ValueError(f"{pointer} is no schema")
        return node

    def _check_bounds(self) -> None:
        num_properties = num_values = 0
        has_reference: str | None = None
        embedded: str | None = None
        for pointer, schema in walk(self.root):
            num_properties += len(schema.get("properties", ()))
            num_values += len(schema.get("enum", ()))
            for keyword in _UNRESOLVABLE:
                if keyword in schema:
                    raise UnsupportedSchemaError(keyword, f"{pointer}/{keyword}", "Use $ref to a local definition.")
            if pointer and isinstance(schema.get("$id", schema.get("id")), str):
                embedded = pointer
            if "$ref" in schema:
                has_reference = pointer
                self.target(pointer, schema["$ref"])
            if isinstance(pattern := schema.get("pattern"), str):
                check_pattern(pattern, pointer, as_key=False)
            for pattern in schema.get("patternProperties", ()):
                check_pattern(pattern, pointer, as_key=True)
        if embedded is not None and has_reference is not None:
            raise UnsupportedSchemaError("$id", f"{embedded}/$id", "Remove it: it would change what references mean.")
        if num_properties > MAX_PROPERTIES:
            raise GrammarTooLargeError("properties of the schema", num_properties, MAX_PROPERTIES)
        if num_values > MAX_ENUM_VALUES:
            raise GrammarTooLargeError("enum values of the schema", num_values, MAX_ENUM_VALUES)


def walk(root: Schema) -> list[tuple[str, dict[str, Any]]]:
    """Every schema within a schema, with its JSON pointer. Values of enum, const, default and such are none."""
    found: list[tuple[str, dict[str, Any]]] = []
    queue: list[tuple[str, Any]] = [("", root)]
    while queue:
        pointer, schema = queue.pop()
        if not isinstance(schema, dict):
            continue
        found.append((pointer, schema))
        for keyword in _NAMED:
            if isinstance(named := schema.get(keyword), dict):
                queue += [(f"{pointer}/{keyword}/{escaped(name)}", child) for name, child in named.items()]
        for keyword in _LISTED:
            if isinstance(listed := schema.get(keyword), list):
                queue += [(f"{pointer}/{keyword}/{i}", child) for i, child in enumerate(listed)]
        queue += [(f"{pointer}/{keyword}", schema[keyword]) for keyword in _SINGLE if keyword in schema]
    return found


def escaped(name: str) -> str:
    """A name as a part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def _pattern_errors(_: Backend, pattern: str, instance: object, __: object) -> Iterator[ValidationError]:
    import jsonschema

    if isinstance(instance, str) and not is_found(pattern, instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_depth(root: object) -> None:
    level: list[Any] = [root]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise GrammarTooLargeError("nested levels of the schema", MAX_DEPTH + 1, MAX_DEPTH)


def _dialect(root: Schema) -> Any:
    """The validator class of the schema's dialect. Raises `InvalidSchemaError` if the schema is not of it."""
    import jsonschema

    if not isinstance(root, (dict, bool)):
        raise InvalidSchemaError("", "a schema is an object, true or false.")
    unknown: Any = None
    stated = jsonschema.validators.validator_for(root, default=unknown)
    guesses = (jsonschema.Draft202012Validator, jsonschema.Draft7Validator, jsonschema.Draft4Validator)
    candidates: tuple[Any, ...] = guesses if stated is None else (stated,)
    first: jsonschema.SchemaError | None = None
    for candidate in candidates:
        try:
            candidate.check_schema(root)
            return candidate
        except jsonschema.SchemaError as error:
            first = first or error
    assert first is not None
    pointer = "".join(f"/{escaped(str(part))}" for part in first.absolute_path)
    raise InvalidSchemaError(pointer, f"{first.message[:300]}. Correct it.")
