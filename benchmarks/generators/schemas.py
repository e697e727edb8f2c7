"""Random JSON Schemas from a fixed list of keywords, the same for the same seed. For tests and benchmarks.

    python benchmarks/generators/schemas.py --count 200 --seed 0 --bounded

Keywords: type (each name, and lists of names), properties, required, additionalProperties, minProperties, items,
prefixItems, minItems, maxItems, enum, const, anyOf, oneOf, allOf, $ref and $defs (recursive ones too), minLength,
maxLength, pattern, format, minimum, maximum, exclusiveMinimum, exclusiveMaximum.
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

NAMES = ["id", "name", "tags", "größe", 'quote"d', "a/b~c", "back\\slash", "url", "items", "next", "名前", "x y"]
VALUES: list[Any] = [
    0,
    1,
    -5,
    2.5,
    True,
    False,
    None,
    "",
    "red",
    "dark blue",
    'he said "no"',
    "line\nbreak",
    [1, 2],
    {"a": {"b": []}},
]
PATTERNS = ["^[a-z]{1,8}$", "^[A-Z]{2}-\\d{3}$", "^(cat|dog)s?$", "^x", "^\\+?[0-9 ]+$", "^(\\w+\\.)?\\w+$"]
ENDING_PATTERNS = [*PATTERNS[:3], "^x.{0,6}$", "^\\+?[0-9 ]{1,8}$", "^(\\w{1,4}\\.)?\\w{1,4}$"]
FORMATS = ["date", "time", "date-time", "uuid", "ipv4"]


MOST_MORE = 6
"""How much longer than it must be a string may be, in `bounded` schemas; an array may be a third as much longer."""


def schemas(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` schemas, each satisfiable."""
    rng = random.Random(seed)
    return [_document(rng) for _ in range(count)]


def bounded(schema: Any) -> Any:
    """The schema with limits where it had none, for a model that does not know when to stop.

    Strings without an end get a `maxLength`, or a pattern that ends; arrays a `maxItems`; objects no further names.
    """
    if isinstance(schema, list):
        return [bounded(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {key: _bounded_part(key, value) for key, value in schema.items()}
    kind = parts.get("type", ())
    if "string" in (kind if isinstance(kind, list) else [kind]) and "format" not in parts:
        if "pattern" in parts:
            parts["pattern"] = ENDING_PATTERNS[PATTERNS.index(parts["pattern"])]
        else:
            parts.setdefault("maxLength", parts.get("minLength", 0) + MOST_MORE)
    if kind == "array":
        least = max(parts.get("minItems", 0), len(parts.get("prefixItems", ())))
        parts.setdefault("maxItems", least + MOST_MORE // 3)
    if kind == "object" and "allOf" not in parts:
        parts["additionalProperties"] = False
    return parts


def _bounded_part(key: str, value: Any) -> Any:
    if key in ("properties", "$defs"):
        return {name: bounded(part) for name, part in value.items()}
    return bounded(value) if key in ("items", "prefixItems", "anyOf", "oneOf", "allOf") else value


def _document(rng: random.Random) -> dict[str, Any]:
    definitions = {f"d{i}": _schema(rng, 2, []) for i in range(rng.randrange(3))}
    if rng.random() < 0.3:
        definitions["tree"] = {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": 0},
                "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
            },
            "required": ["value"],
        }
    schema = _object(rng, 3, list(definitions)) if rng.random() < 0.7 else _schema(rng, 3, list(definitions))
    return {**schema, **({"$defs": definitions} if definitions else {})}


def _schema(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    leaves = [_string, _integer, _number, _enum, _plain]
    if depth > 0:
        leaves += [_object, _object, _array, _tuple, _any_of, _one_of, _all_of, _nullable]
    if definitions:
        leaves += [_reference]
    return rng.choice(leaves)(rng, depth, definitions)


def _plain(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "string"]}, {"type": "string"}])


def _string(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    least = rng.randrange(4)
    bounds: list[dict[str, Any]] = [
        {},
        {"minLength": least},
        {"maxLength": least + rng.randrange(8)},
        {"minLength": least, "maxLength": least + rng.randrange(6)},
        {"pattern": rng.choice(PATTERNS)},
        {"format": rng.choice(FORMATS)},
    ]
    return {"type": "string", **rng.choice(bounds)}


def _integer(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    low, high = sorted((rng.randint(-2000, 2000), rng.randint(-20, 20)))
    bounds = [{}, {"minimum": low}, {"maximum": high}, {"minimum": low, "maximum": high}]
    bounds += [{"exclusiveMinimum": low, "maximum": high + 1}, {"minimum": low, "exclusiveMaximum": high + 1}]
    return {"type": "integer", **rng.choice(bounds)}


def _number(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    low, high = sorted((round(rng.uniform(-50, 50), 2), round(rng.uniform(-2, 2), 3)))
    bounds = [{}, {"minimum": low}, {"maximum": high}, {"minimum": low, "maximum": high}]
    bounds += [{"exclusiveMinimum": 0, "exclusiveMaximum": 1}, {"exclusiveMinimum": low, "maximum": high + 0.5}]
    return {"type": "number", **rng.choice(bounds)}


def _enum(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {"const": rng.choice(VALUES)}
    return {"enum": rng.sample(VALUES, rng.randint(1, 5))}


def _object(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randrange(5))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _schema(rng, depth - 1, definitions) for name in names},
    }
    if names and rng.random() < 0.7:
        schema["required"] = rng.sample(names, rng.randint(1, len(names)))
    extra = rng.random()
    if extra < 0.3:
        schema["additionalProperties"] = False
    elif extra < 0.45:
        schema["additionalProperties"] = _schema(rng, 0, [])
    return schema


def _array(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    least = rng.randrange(3)
    bounds = rng.choice([{}, {"minItems": least}, {"maxItems": least}, {"minItems": least, "maxItems": least + 2}])
    return {"type": "array", "items": _schema(rng, depth - 1, definitions), **bounds}


def _tuple(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    elements = [_schema(rng, depth - 1, definitions) for _ in range(rng.randint(1, 3))]
    rest: dict[str, Any] = rng.choice([{}, {"items": False}, {"items": {"type": "integer"}, "maxItems": 4}])
    return {"type": "array", "prefixItems": elements, **rest}


def _any_of(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    return {"anyOf": [_schema(rng, depth - 1, definitions) for _ in range(rng.randint(1, 3))]}


def _one_of(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    """Told apart by a constant."""
    branches = []
    for kind in rng.sample(["circle", "square", "line"], 2):
        branches.append(
            {
                "type": "object",
                "properties": {"kind": {"const": kind}, "of": _schema(rng, depth - 1, definitions)},
                "required": ["kind"],
            }
        )
    return {"oneOf": branches}


def _all_of(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    """Siblings, to be merged: neither part says everything."""
    return {
        "type": "object",
        "required": ["id", "name"],
        "properties": {"id": {"type": "integer"}},
        "allOf": [
            {"properties": {"id": {"minimum": 1}, "name": _schema(rng, depth - 1, definitions)}},
            {"properties": {"id": {"maximum": rng.randint(1, 300)}}},
        ],
    }


def _nullable(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    return {"anyOf": [_schema(rng, depth - 1, definitions), {"type": "null"}]}


def _reference(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    reference = {"$ref": f"#/$defs/{rng.choice(definitions)}"}
    return {**reference, "description": "with a sibling"} if rng.random() < 0.5 else reference


def main() -> None:
    options = argparse.ArgumentParser(description="Prints random JSON Schemas, one a line.")
    options.add_argument("--count", type=int, default=200, help="how many (default: 200)")
    options.add_argument("--seed", type=int, default=0, help="the same seed, the same schemas (default: 0)")
    options.add_argument("--bounded", action="store_true", help="with limits to what can be written")
    args = options.parse_args()
    for schema in schemas(args.count, args.seed):
        print(json.dumps(bounded(schema) if args.bounded else schema, ensure_ascii=False))


if __name__ == "__main__":
    main()
