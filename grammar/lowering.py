"""A JSON Schema as a grammar of the JSON texts that satisfy it, in one order of keys and one spacing.

A place in a schema is a *conjunction*: all the schemas that hold there at once. `$ref` and `allOf` add to it, `anyOf`
and `oneOf` split it into one conjunction for each branch, and what is left merges keyword by keyword. So siblings of
those keywords keep their meaning. The grammar never admits what it claims to exclude; where JSON Schema cannot be
carried by a grammar, the keyword is listed in `unenforced`.

    {"$ref": "#/$defs/a", "maximum": 9, "anyOf": [x, y]}   ->   {a, maximum: 9, x}  |  {a, maximum: 9, y}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from treadle.grammar import leaves
from treadle.grammar.containers import array_rule, object_rule
from treadle.grammar.errors import GrammarTooLargeError, InvalidSchemaError, UnsupportedSchemaError
from treadle.grammar.preflight import TYPE_POINTERS, SchemaDocument
from treadle.grammar.rules import Alternative, Rules, literal

MAX_CONJUNCTIONS = 20_000
MAX_REFERENCES = 100
STRING_STATES = 256
STRICT_STRING_STATES = 512

TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})

_FAMILIES = {
    "object": (
        *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
        *("minProperties", "maxProperties", "unevaluatedProperties"),
    ),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains", "additionalItems"),
    "string": ("minLength", "maxLength", "pattern"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}


@dataclass(frozen=True, slots=True)
class Separators:
    """What stands between elements, and between a key and its value."""

    item: str
    key: str


@dataclass(frozen=True, slots=True)
class Place:
    """A conjunction by the pointers of its schemas, and the choices among them that are made already."""

    pointers: tuple[str, ...]
    made: tuple[str, ...] = ()


class Lowering:
    """Turns one schema into one grammar. `unenforced` is complete once `grammar` has returned."""

    def __init__(
        self, document: SchemaDocument, separators: Separators, *, strict: bool, root_type: str | None = None
    ) -> None:
        self.document = document
        self.separators = separators
        self.strict = strict
        self.rules = Rules()
        self.string_states = STRICT_STRING_STATES if strict else STRING_STATES
        self._root_type = root_type
        self._unenforced: dict[str, str] = {}
        self._names: dict[Place, str] = {}
        self._waiting: list[Place] = []

    @property
    def unenforced(self) -> tuple[str, ...]:
        """JSON pointers of the keywords that the grammar does not guarantee."""
        return tuple(sorted(self._unenforced))

    def grammar(self, before: str = "", after: str = "") -> str:
        """GBNF whose start rule is `root`: the schema's JSON between two fragments.

        Raises `InvalidSchemaError` if nothing satisfies the schema, `UnsupportedSchemaError` under `strict` for a
        keyword that is not enforced, and `GrammarTooLargeError`.
        """
        leaves.define_any(self.rules, self.separators.item, self.separators.key)
        start = self.rule(("",) if self._root_type is None else ("", TYPE_POINTERS[self._root_type]))
        self.rules.define("root", [Alternative(f"{before} {start} {after}".strip(), (start,))])
        while self._waiting:
            self._define(self._waiting.pop())
        if self.strict and self._unenforced:
            pointer, keyword = min(self._unenforced.items())
            raise UnsupportedSchemaError(keyword, pointer, "Remove it, or leave out strict and validate the result.")
        text = self.rules.text("root")
        if not text:
            raise InvalidSchemaError("", "no JSON value satisfies it. Look for keywords that contradict each other.")
        return text

    def rule(self, pointers: tuple[str, ...], made: tuple[str, ...] = ()) -> str:
        """The name of the rule for the values that satisfy all of these schemas."""
        place = Place(tuple(dict.fromkeys(pointers)), made)
        if not place.pointers:
            return "value"
        name = self._names.get(place)
        if name is None:
            if len(self._names) >= MAX_CONJUNCTIONS:
                raise GrammarTooLargeError("combinations of schemas", len(self._names), MAX_CONJUNCTIONS)
            name = self._names[place] = f"r{len(self._names)}"
            self._waiting.append(place)
        return name

    def skip(self, pointer: str, keyword: str) -> None:
        """Notes that the grammar does not guarantee a keyword of the schema at `pointer`."""
        self._unenforced[f"{pointer}/{keyword}"] = keyword

    def fresh(self, name: str, label: str) -> str:
        """A name for an auxiliary rule of the rule `name`."""
        return f"{name}-{label}"

    def _define(self, place: Place) -> None:
        name = self._names[place]
        conjunction = self._flatten(place)
        if conjunction is None:
            self.rules.define(name, [])
            return
        if not conjunction:
            self.rules.define(name, [Alternative("value", ("value",))])
            return
        if any("enum" in schema or "const" in schema for schema in conjunction.values()):
            self._define_values(name, conjunction)
            return
        for pointer, schema in conjunction.items():
            for keyword in ("anyOf", "oneOf"):
                choice = f"{pointer}/{keyword}"
                if keyword in schema and choice not in place.made:
                    if keyword == "oneOf" and not self._disjoint(choice, schema[keyword]):
                        self.skip(pointer, keyword)
                    made = (*place.made, choice)
                    branches = [f"{choice}/{i}" for i in range(len(schema[keyword]))]
                    names = [self.rule((*place.pointers, branch), made) for branch in branches]
                    self.rules.define(name, [Alternative(branch, (branch,)) for branch in names])
                    return
        self._define_shape(name, conjunction)

    def _flatten(self, place: Place) -> dict[str, dict[str, Any]] | None:
        """All schemas that hold at a place, by pointer, or None if one of them is `false`.

        Raises `InvalidSchemaError` for a schema that holds at its own place again.
        """
        found: dict[str, dict[str, Any]] = {}
        via: dict[str, str | None] = {}
        false = False

        def add(pointer: str, parent: str | None) -> None:
            nonlocal false
            ancestor, depth = parent, 0
            while ancestor is not None:
                if ancestor == pointer:
                    raise InvalidSchemaError(pointer, "its references lead back to itself at the same place.")
                ancestor, depth = via[ancestor], depth + 1
            if depth > MAX_REFERENCES:
                raise GrammarTooLargeError("references in a row", depth, MAX_REFERENCES)
            if pointer in via:
                return
            via[pointer] = parent
            schema = self.document.at(pointer)
            if isinstance(schema, bool):
                false = false or not schema
                return
            found[pointer] = schema
            if "$ref" in schema:
                add(self.document.target(pointer, schema["$ref"]), pointer)
            for i in range(len(schema.get("allOf", ()))):
                add(f"{pointer}/allOf/{i}", pointer)

        for pointer in place.pointers:
            choice, _, _ = pointer.rpartition("/")
            owner = choice.rpartition("/")[0]
            add(pointer, owner if choice in place.made and owner in via else None)
        return None if false else found

    def _define_values(self, name: str, conjunction: dict[str, dict[str, Any]]) -> None:
        """Enumerated values are checked one by one, against every keyword of every schema that holds here."""
        source, keyword = next((p, k) for k in ("const", "enum") for p, schema in conjunction.items() if k in schema)
        values = conjunction[source][keyword] if keyword == "enum" else [conjunction[source]["const"]]
        separators = (self.separators.item, self.separators.key)
        texts = [
            json.dumps(value, ensure_ascii=False, separators=separators)
            for value in values
            if all(self.document.is_valid(p, value, keyword if p == source else "") for p in conjunction)
        ]
        self.rules.define(name, [Alternative(literal(text)) for text in texts])

    def _define_shape(self, name: str, conjunction: dict[str, dict[str, Any]]) -> None:
        types = self._types(conjunction)
        for pointer, schema in conjunction.items():
            for keyword in ("not", "if"):
                if keyword in schema and (keyword == "not" or "then" in schema or "else" in schema):
                    self.skip(pointer, keyword)
        alternatives: list[Alternative] = []
        if "null" in types:
            alternatives.append(Alternative('"null"'))
        if "boolean" in types:
            alternatives += [Alternative('"true"'), Alternative('"false"')]
        if types & {"integer", "number"}:
            alternatives += leaves.number_alternatives(self, conjunction, whole="number" not in types)
        if "string" in types:
            alternatives += leaves.string_alternatives(self, name, conjunction)
        if "array" in types:
            alternatives += array_rule(self, name, conjunction)
        if "object" in types:
            alternatives += object_rule(self, name, conjunction)
        self.rules.define(name, alternatives)

    def _types(self, conjunction: dict[str, dict[str, Any]]) -> set[str]:
        """The types that all schemas admit. Where none names one, those that the keywords are about, if any."""
        types = set(TYPES)
        stated = [schema["type"] for schema in conjunction.values() if "type" in schema]
        for one in stated:
            names = {one} if isinstance(one, str) else set(one)
            types &= names | ({"integer"} if "number" in names else set())
        if not stated:
            used = {keyword for schema in conjunction.values() for keyword in schema}
            meant = {family for family, keywords in _FAMILIES.items() if used.intersection(keywords)}
            types &= meant or types
        return types

    def _disjoint(self, choice: str, branches: list[Any]) -> bool:
        """Whether no value can satisfy two branches of a `oneOf`, as far as types and fixed values show."""
        views = [self._flatten(Place((f"{choice}/{i}",))) for i in range(len(branches))]
        known = [view for view in views if view is not None]
        return all(self._apart(a, b) for i, a in enumerate(known) for b in known[:i])

    def _apart(self, a: dict[str, dict[str, Any]], b: dict[str, dict[str, Any]]) -> bool:
        types_a, types_b = self._stated_types(a), self._stated_types(b)
        common = types_a & types_b
        if not common or _fixed_apart(_fixed_values(a.values()), _fixed_values(b.values())):
            return True
        if common != {"object"}:
            return False
        required = {name for view in (a, b) for schema in view.values() for name in schema.get("required", ())}
        return any(
            _fixed_apart(self._property_values(a, name), self._property_values(b, name))
            for name in required
            if all(any(name in schema.get("required", ()) for schema in view.values()) for view in (a, b))
        )

    def _stated_types(self, view: dict[str, dict[str, Any]]) -> set[str]:
        types = set(TYPES)
        for schema in view.values():
            if "type" in schema:
                names = {schema["type"]} if isinstance(schema["type"], str) else set(schema["type"])
                types &= names | ({"integer"} if "number" in names else set())
        return types

    def _property_values(self, view: dict[str, dict[str, Any]], name: str) -> list[Any] | None:
        """The values that a property may have if a schema fixes them."""
        for schema in view.values():
            found = schema.get("properties", {}).get(name)
            if isinstance(found, dict) and (values := _fixed_values([found])) is not None:
                return values
        return None


def _fixed_values(schemas: Any) -> list[Any] | None:
    for schema in schemas:
        if "const" in schema:
            return [schema["const"]]
        if "enum" in schema:
            return list(schema["enum"])
    return None


def _fixed_apart(a: list[Any] | None, b: list[Any] | None) -> bool:
    """Whether both are fixed to values of which none are equal. 1, 1.0 and true count as equal, to be sure."""
    return a is not None and b is not None and not any(x == y for x in a for y in b)
