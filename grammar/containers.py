"""Grammar of JSON's arrays and objects within what the schemas of one place say together.

Objects have their properties in the order of the schema, each at most once. Properties that no schema names appear only
where `additionalProperties` or `patternProperties` invite them; the same goes for elements beyond `prefixItems`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.grammar.errors import GrammarTooLargeError
from treadle.grammar.pattern import UntranslatableError, json_pattern
from treadle.grammar.preflight import TYPE_POINTERS, escaped
from treadle.grammar.rules import Alternative, Rules, literal

if TYPE_CHECKING:
    from treadle.grammar.lowering import Lowering

Conjunction = dict[str, dict[str, Any]]

MAX_ITEMS = 10_000
MAX_MEMBERS = 1_000
MAX_EXCLUDED = 4_096

_ANY_KEY_CHAR = r"\0-\x1f\"\\\ud800-\udfff"


@dataclass(frozen=True, slots=True)
class Member:
    """A property that the schemas name: GBNF of its key, and the rule of its value."""

    key: str
    value: str
    required: bool


@dataclass(frozen=True, slots=True)
class Extra:
    """Properties beyond the named ones: the rules of their keys, colon not included, and of their values."""

    key: str
    value: str


def array_rule(lowering: Lowering, name: str, conjunction: Conjunction) -> list[Alternative]:
    """The arrays that satisfy all schemas."""
    least = max(int(schema.get("minItems", 0)) for schema in conjunction.values())
    most = min((int(schema["maxItems"]) for schema in conjunction.values() if "maxItems" in schema), default=None)
    if max(least, most or 0) > MAX_ITEMS:
        raise GrammarTooLargeError("elements of an array", max(least, most or 0), MAX_ITEMS)
    prefixes = {pointer: _prefix(pointer, schema) for pointer, schema in conjunction.items()}
    rests = {pointer: _rest(pointer, schema) for pointer, schema in conjunction.items()}
    fixed = [
        lowering.rule(
            tuple(
                _element(prefixes[pointer], rests[pointer], i)
                for pointer in conjunction
                if _element(prefixes[pointer], rests[pointer], i)
            )
        )
        for i in range(max(len(prefix) for prefix in prefixes.values()))
    ]
    stated = tuple(rest for rest in rests.values() if rest)
    if fixed and not stated and least <= len(fixed):
        most = len(fixed) if most is None else min(most, len(fixed))
    _skip_array_keywords(lowering, conjunction, most)
    if most is not None and most < least:
        return []
    rest = lowering.rule(stated)
    return _elements(lowering, name, fixed, rest, least, most)


def _elements(
    lowering: Lowering, name: str, fixed: list[str], rest: str, least: int, most: int | None
) -> list[Alternative]:
    comma = literal(lowering.separators.item)
    alternatives = [Alternative('"[]"')] if not least else []
    if most == 0:
        return alternatives
    if not fixed:
        count = f"{{{max(0, least - 1)},{-1 if most is None else most - 1}}}"
        return [*alternatives, Alternative(f'"[" {rest} ({comma} {rest}){count} "]"', (rest,))]
    limit = len(fixed) if most is None else min(len(fixed), most)
    tails = [lowering.fresh(name, f"after-{i}") for i in range(limit + 1)]
    for i in range(1, limit + 1):
        options = [Alternative('""')] if i >= least else []
        if i < limit:
            options.append(Alternative(f"{comma} {fixed[i]} {tails[i + 1]}", (fixed[i], tails[i + 1])))
        elif most is None or most > limit:
            count = f"{{{max(1, least - i)},{-1 if most is None else most - i}}}"
            options.append(Alternative(f"({comma} {rest}){count}", (rest,)))
        lowering.rules.define(tails[i], options)
    return [*alternatives, Alternative(f'"[" {fixed[0]} {tails[1]} "]"', (fixed[0], tails[1]))]


def _prefix(pointer: str, schema: dict[str, Any]) -> list[str]:
    keyword = "prefixItems" if "prefixItems" in schema else "items"
    listed = schema.get(keyword)
    return [f"{pointer}/{keyword}/{i}" for i in range(len(listed))] if isinstance(listed, list) else []


def _rest(pointer: str, schema: dict[str, Any]) -> str:
    if isinstance(schema.get("items"), list):
        return f"{pointer}/additionalItems" if "additionalItems" in schema else ""
    return f"{pointer}/items" if "items" in schema else ""


def _element(prefix: list[str], rest: str, i: int) -> str:
    return prefix[i] if i < len(prefix) else rest


def _skip_array_keywords(lowering: Lowering, conjunction: Conjunction, most: int | None) -> None:
    for pointer, schema in conjunction.items():
        if schema.get("uniqueItems") and (most is None or most > 1):
            lowering.skip(pointer, "uniqueItems")
        if "contains" in schema:
            lowering.skip(pointer, "contains")
        if schema.get("unevaluatedItems", True) not in (True, {}):
            lowering.skip(pointer, "unevaluatedItems")


def object_rule(lowering: Lowering, name: str, conjunction: Conjunction) -> list[Alternative]:
    """The objects that satisfy all schemas."""
    required = dict.fromkeys(key for schema in conjunction.values() for key in schema.get("required", ()))
    keys = dict.fromkeys(key for schema in conjunction.values() for key in schema.get("properties", ()))
    keys |= required
    if len(keys) > MAX_MEMBERS:
        raise GrammarTooLargeError("properties of one object", len(keys), MAX_MEMBERS)
    members = []
    for key in keys:
        if not _name_allowed(lowering, conjunction, key):
            if key in required:
                return []
            continue
        value = lowering.rule(tuple(_value_pointers(conjunction, key)))
        text = literal(json.dumps(key, ensure_ascii=False) + lowering.separators.key)
        members.append(Member(text, value, key in required))
    undeclared = [key for key in required if not any(key in s.get("properties", ()) for s in conjunction.values())]
    extra = _extra(lowering, name, conjunction, list(keys))
    if extra is None and not keys and _says_nothing(conjunction):
        extra = Extra("string", "value")
    _skip_object_keywords(lowering, conjunction, closed=extra is None and not undeclared)
    return _members(lowering, name, conjunction, members, extra)


def _members(
    lowering: Lowering, name: str, conjunction: Conjunction, members: list[Member], extra: Extra | None
) -> list[Alternative]:
    """The object with its members, within `minProperties` and `maxProperties` as far as they can be counted."""
    least = max(int(schema.get("minProperties", 0)) for schema in conjunction.values())
    most = min((int(s["maxProperties"]) for s in conjunction.values() if "maxProperties" in s), default=None)
    num_required = sum(member.required for member in members)
    if most is not None and most < max(least, num_required):
        return []
    comma = literal(lowering.separators.item)
    # A key may come twice, which counts once, so that extra members cannot be counted upwards beyond the first.
    countable = not members and extra is not None
    if least > num_required and not (countable and least == 1):
        _skip_counts(lowering, conjunction, "minProperties")
    if most is not None and (extra is not None or len(members) > most) and not countable:
        _skip_counts(lowering, conjunction, "maxProperties")
    if extra is not None and countable:
        pair = f"{extra.key} {literal(lowering.separators.key)} {extra.value}"
        needs = (extra.key, extra.value)
        empty = [] if least else [Alternative('"{}"')]
        if most == 0:
            return empty
        count = f"{{0,{-1 if most is None else min(most, MAX_ITEMS) - 1}}}"
        return [*empty, Alternative(f'"{{" {pair} ({comma} {pair}){count} "}}"', needs)]
    return _sequence(lowering, name, members, extra)


def _sequence(lowering: Lowering, name: str, members: list[Member], extra: Extra | None) -> list[Alternative]:
    """Named members in their order, optional ones or not, then any extra ones.

    For each position, `some-i` is at least one member from there on, and `next-i` what follows the member before. The
    comma comes before the choice of the next member, so that the end of a value has only two ways to go on.
    """
    rules, comma, count = lowering.rules, literal(lowering.separators.item), len(members)
    some = [lowering.fresh(name, f"some-{i}") for i in range(count + 1)]
    following = [lowering.fresh(name, f"next-{i}") for i in range(count + 1)]
    may_end = True
    for i in range(count, -1, -1):
        if i < count:
            may_end = may_end and not members[i].required
            rules.define(some[i], _member_options(members, i, some, following, comma))
        elif extra is not None:
            pair = f"{extra.key} {literal(lowering.separators.key)} {extra.value} {following[i]}"
            rules.define(some[i], [Alternative(pair, (extra.key, extra.value, following[i]))])
        else:
            rules.define(some[i], [])
        ending = [Alternative('""')] if may_end else []
        rules.define(following[i], [*ending, Alternative(f"{comma} {some[i]}", (some[i],))])
    empty = [Alternative('"{}"')] if may_end else []
    return [*empty, Alternative(f'"{{" {some[0]} "}}"', (some[0],))]


def _member_options(
    members: list[Member], i: int, some: list[str], following: list[str], comma: str
) -> list[Alternative]:
    """The member at `i` with all required ones right after it, or if it is optional, what may come instead."""
    text, needs, j = f"{members[i].key} {members[i].value}", [members[i].value], i + 1
    while j < len(members) and members[j].required:
        text += f" {comma} {members[j].key} {members[j].value}"
        needs.append(members[j].value)
        j += 1
    options = [Alternative(f"{text} {following[j]}", (*needs, following[j]))]
    return options if members[i].required else [*options, Alternative(some[i + 1], (some[i + 1],))]


def _value_pointers(conjunction: Conjunction, key: str) -> list[str]:
    """The schemas that a property's value must satisfy."""
    found = []
    for pointer, schema in conjunction.items():
        own = []
        if key in schema.get("properties", ()):
            own.append(f"{pointer}/properties/{escaped(key)}")
        for pattern in schema.get("patternProperties", ()):
            if re.search(pattern, key):
                own.append(f"{pointer}/patternProperties/{escaped(pattern)}")
        if not own and "additionalProperties" in schema:
            own.append(f"{pointer}/additionalProperties")
        found += own
    return found


def _name_allowed(lowering: Lowering, conjunction: Conjunction, key: str) -> bool:
    return all(
        lowering.document.is_valid(f"{pointer}/propertyNames", key)
        for pointer, schema in conjunction.items()
        if "propertyNames" in schema
    )


def _says_nothing(conjunction: Conjunction) -> bool:
    """Whether the schemas leave the members open: then any object will do, not only the empty one."""
    closing = ("properties", "patternProperties", "additionalProperties", "unevaluatedProperties", "propertyNames")
    return not any(keyword in schema for schema in conjunction.values() for keyword in closing)


def _extra(lowering: Lowering, name: str, conjunction: Conjunction, keys: list[str]) -> Extra | None:
    """What members the schemas invite beyond the named ones."""
    patterns = [
        (pattern, f"{pointer}/patternProperties/{escaped(pattern)}")
        for pointer, schema in conjunction.items()
        for pattern in schema.get("patternProperties", ())
    ]
    additional = [
        f"{pointer}/additionalProperties" for pointer, schema in conjunction.items() if "additionalProperties" in schema
    ]
    names = tuple(f"{pointer}/propertyNames" for pointer, schema in conjunction.items() if "propertyNames" in schema)
    if patterns:
        return None if keys or names else _pattern_extra(lowering, name, conjunction, patterns)
    if not additional and not (names and not keys):
        return None
    value = lowering.rule(tuple(additional))
    if names:
        return None if keys else Extra(lowering.rule((*names, TYPE_POINTERS["string"])), value)
    key = _key_rule(lowering.rules, lowering.fresh(name, "key"), keys)
    return None if key is None else Extra(key, value)


def _pattern_extra(
    lowering: Lowering, name: str, conjunction: Conjunction, patterns: list[tuple[str, str]]
) -> Extra | None:
    """Members whose key matches a pattern. Their value satisfies every pattern's schema: a key may match several."""
    alternatives = []
    for pattern, _ in patterns:
        try:
            chosen = json_pattern(pattern, lossy=True)
        except UntranslatableError:
            continue
        alternatives += [
            Alternative(f'"\\"" {text} chars', ("chars",)) if more else Alternative(f'"\\"" {text} "\\""')
            for text, more in chosen.alternatives
        ]
    if not alternatives:
        return None
    key = lowering.fresh(name, "key")
    lowering.rules.define(key, alternatives)
    others = [
        f"{pointer}/additionalProperties"
        for pointer, schema in conjunction.items()
        if "additionalProperties" in schema and "patternProperties" not in schema
    ]
    return Extra(key, lowering.rule((*(pointer for _, pointer in patterns), *others)))


def _key_rule(rules: Rules, name: str, keys: list[str]) -> str | None:
    """A rule for keys other than the named ones, written without escapes so that no spelling is another's double.

    None if there are too many to tell apart.
    """
    if sum(map(len, keys)) > MAX_EXCLUDED:
        return None
    if not keys:
        return "string"
    tree: dict[str, Any] = {}
    for key in keys:
        node = tree
        for char in key:
            node = node.setdefault(char, {})
        node[""] = {}
    free = f"{name}-free"
    rules.define(free, [Alternative('"\\""'), Alternative(f"[^{_ANY_KEY_CHAR}] {free}")])
    queue = [(f"{name}-0", tree)]
    rules.define(name, [Alternative(f'"\\"" {name}-0', (f"{name}-0",))])
    count = 0
    while queue:
        rule, node = queue.pop()
        plain = [char for char in node if char and char >= " " and char not in '"\\']
        excluded = "".join(_class_char(char) for char in plain)
        options = [Alternative(f"[^{_ANY_KEY_CHAR}{excluded}] {free}", (free,))]
        if "" not in node:
            options.append(Alternative('"\\""'))
        for char in plain:
            count += 1
            child = f"{name}-{count}"
            queue.append((child, node[char]))
            options.append(Alternative(f"{literal(char)} {child}", (child,)))
        rules.define(rule, options)
    return name


def _class_char(char: str) -> str:
    return (
        char
        if char.isascii() and char.isalnum()
        else f"\\u{ord(char):04x}"
        if ord(char) < 0x10000
        else f"\\U{ord(char):08x}"
    )


def _skip_object_keywords(lowering: Lowering, conjunction: Conjunction, *, closed: bool) -> None:
    for pointer, schema in conjunction.items():
        for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
            if schema.get(keyword):
                lowering.skip(pointer, keyword)
        alone = (
            closed
            and not conjunction.keys() - {pointer, *TYPE_POINTERS.values()}
            and schema.get("unevaluatedProperties") is False
        )
        if schema.get("unevaluatedProperties", True) not in (True, {}) and not alone:
            lowering.skip(pointer, "unevaluatedProperties")


def _skip_counts(lowering: Lowering, conjunction: Conjunction, keyword: str) -> None:
    for pointer, schema in conjunction.items():
        if schema.get(keyword):
            lowering.skip(pointer, keyword)
