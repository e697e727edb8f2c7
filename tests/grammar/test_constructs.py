"""Constructs that the grammar library reads wrongly when left alone: enforced, or listed, or refused; never silent.

A row is a schema, values that it admits, values that it does not, and the keywords that may be listed as not enforced.
"""

import json
import re

import jsonschema
import pytest

from treadle.grammar import (
    GrammarError,
    GrammarTooLargeError,
    InvalidSchemaError,
    JSONSchema,
    UnsupportedSchemaError,
)

S = {"type": "string"}
I = {"type": "integer"}  # noqa: E741

ROWS = [
    # Strings: every bound counts characters, escaped or not, and no raw control byte passes.
    ({**S, "minLength": 1}, ["a", 'say "hi"', "line\nbreak", "back\\slash", "é"], ["", 1], []),
    ({**S, "maxLength": 3}, ["", "a\n\"", "日本語"], ["abcd", "\n\n\n\n"], []),
    ({**S, "minLength": 2, "maxLength": 2}, ["ab", "\\\\"], ["a", "abc"], []),
    ({**S, "maxLength": 100_000}, ["x" * 50, '"'], [1], ["maxLength"]),
    ({**S, "pattern": "^[a-z]+$"}, ["abc"], ["", "aB", "a1"], []),
    ({**S, "pattern": "^a"}, ["a", 'a"\n'], ["b", ""], []),
    ({**S, "pattern": "a"}, ["a", "cat", 'a"'], [], ["pattern"]),
    ({**S, "pattern": "^(?=a).*$"}, ["a"], [], ["pattern"]),
    ({**S, "pattern": "^[a-z]+$", "minLength": 2}, ["ab"], ["A1"], ["minLength"]),
    ({**S, "pattern": "^[a-z]{2,4}$", "maxLength": 4}, ["ab"], ["a", "abcde"], []),
    ({**S, "format": "date-time"}, ["2026-08-17T10:00:00Z"], ["2026-13-17T10:00:00Z", "x"], []),
    ({**S, "format": "date", "maxLength": 3}, [], ["x"], ["maxLength"]),
    ({**S, "format": "hostname"}, ["example.org"], [], ["format"]),
    # Numbers.
    ({**I, "minimum": 3}, [3, 1000], [2, -5, 3.5], []),
    ({**I, "minimum": 3, "exclusiveMinimum": True}, [4], [3], []),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, [0.5, 1, 0.001], [0, -1, 1.01, 2], []),
    ({**I, "multipleOf": 3}, [3], [], ["multipleOf"]),
    ({"type": "number", "multipleOf": 1}, [3], [3.5], []),
    # Siblings.
    ({"$ref": "#/$defs/i", "maximum": 5, "$defs": {"i": I}}, [5], [6, "x"], []),
    ({"anyOf": [I, S], "enum": [1, "a", None]}, [1, "a"], [None, 2, "b"], []),
    ({"type": "object", "required": ["b"], "anyOf": [{"properties": {"b": I}}, {"properties": {"b": S}}]},
     [{"b": 1}, {"b": "x"}], [{}, {"b": None}], []),
    ({"allOf": [{"minimum": 3}, {"maximum": 5}], **I}, [3, 5], [2, 6], []),
    ({"allOf": [{"properties": {"a": I}}, {"properties": {"b": S}, "required": ["b"]}], "type": "object"},
     [{"a": 1, "b": "x"}, {"b": "x"}], [{"a": 1}, {"a": "x", "b": "x"}], []),
    ({"enum": [1, "a"], **S}, ["a"], [1], []),
    ({"const": {"a": 1, "b": [2]}}, [{"a": 1, "b": [2]}], [{"a": 1}, 1], []),
    ({"oneOf": [I, {"minimum": 5, "type": "number"}]}, [3], [None], ["oneOf"]),
    ({"oneOf": [I, S]}, [1, "x"], [None], []),
    ({"minimum": 3}, [4], [2], []),
    ({"required": ["x"]}, [{"x": None}], [{}], []),
    # Objects.
    ({"type": "object", "properties": {"a": I}, "required": ["a", "z"]}, [{"a": 1, "z": 2}], [{"a": 1}, {}], []),
    ({"type": "object", "properties": {"a": I}, "additionalProperties": S},
     [{"a": 1, "b": "x"}, {"b": "x", "ab": "y"}], [{"a": "x"}, {"b": 1}], []),
    ({"type": "object", "properties": {}}, [{}], [], []),
    ({"type": "object"}, [{}, {"x": [1]}], [1], []),
    ({"type": "object", "minProperties": 1, "additionalProperties": I}, [{"a": 1}], [{}], []),
    ({"type": "object", "minProperties": 2, "additionalProperties": I}, [{"a": 1, "b": 1}], [1], ["minProperties"]),
    ({"type": "object", "maxProperties": 1, "additionalProperties": I}, [{}, {"a": 1}], [{"a": 1, "b": 2}], []),
    ({"type": "object", "patternProperties": {"^x": I}, "additionalProperties": False}, [{"xa": 1}], [{"a": 1}], []),
    ({"type": "object", "properties": {"xa": {}}, "patternProperties": {"^x": I}}, [{"xa": 1}], [{"xa": "s"}], []),
    ({"type": "object", "patternProperties": {"^.{1,255}$": {}}}, [{"a": 1}], [1], []),
    ({"type": "object", "propertyNames": {"maxLength": 2}, "additionalProperties": I}, [{"ab": 1}], [{"abc": 1}], []),
    ({"type": "object", "properties": {"a": I, "b": I}, "dependentRequired": {"a": ["b"]}},
     [{"b": 1}], [{"a": "x"}], ["dependentRequired"]),
    ({"type": "object", "properties": {"a": I}, "unevaluatedProperties": False}, [{"a": 1}], [{"a": 1, "b": 1}], []),
    ({"type": "object", "properties": {"a": False}}, [{}], [{"a": 1}], []),
    ({"type": "object", "properties": {"a~b/c": {"$ref": "#/$defs/x~1y"}}, "$defs": {"x/y": I}}, [{"a~b/c": 1}],
     [{"a~b/c": "s"}], []),
    # Arrays.
    ({"type": "array", "items": [I, S], "additionalItems": False}, [[1, "x"], []], [["x"], [1, "x", 2]], []),
    ({"type": "array", "prefixItems": [True, I]}, [["x", 1]], [["x", "y"]], []),
    ({"type": "array", "items": I, "minItems": 1, "maxItems": 2}, [[1], [1, 2]], [[], [1, 2, 3]], []),
    ({"type": "array", "items": I, "uniqueItems": True}, [[1]], [["x"]], ["uniqueItems"]),
    ({"type": "array", "contains": I}, [[1]], [1], ["contains"]),
    # Logic.
    ({**I, "not": {"const": 5}}, [3], ["x"], ["not"]),
    ({**I, "if": {"minimum": 5}, "then": {"maximum": 9}}, [3, 6], ["x"], ["if"]),
    ({**I, "nullable": True}, [3], [None], []),
]  # fmt: skip


def spellings(value):
    """The compact text of a value, and once more with every character that may be escaped."""
    compact = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return {compact, json.dumps(value, separators=(",", ":"))}


def admits(grammar, text):
    matcher = grammar.matcher()
    return matcher.accept_text(text.encode()) and matcher.can_end


@pytest.mark.parametrize(("schema", "valid", "invalid", "listed"), ROWS, ids=lambda v: json.dumps(v)[:60])
def test_a_construct_is_enforced_or_listed(byte_compiler, schema, valid, invalid, listed):
    grammar = byte_compiler.compile(JSONSchema(json.dumps(schema)))
    assert sorted({pointer.rpartition("/")[2] for pointer in grammar.unenforced}) == listed
    for value in valid:
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        assert admits(grammar, text), text
    for value in invalid:
        for text in spellings(value):
            assert not admits(grammar, text), text


@pytest.mark.parametrize(("schema", "listed"), [(row[0], row[3]) for row in ROWS], ids=lambda v: json.dumps(v)[:60])
def test_strict_refuses_by_name_what_is_not_enforced(byte_compiler, schema, listed):
    strict = JSONSchema(json.dumps(schema), strict=True)
    if not listed:
        assert byte_compiler.compile(strict).unenforced == ()
        return
    with pytest.raises(UnsupportedSchemaError) as refused:
        byte_compiler.compile(strict)
    assert refused.value.keyword in listed
    assert refused.value.pointer.endswith(refused.value.keyword)


@pytest.mark.parametrize("text", ['"\x01"', '"\t"', '"\x00"', '"\\ud800"', '"\\udc00\\ud800"', '"\\x41"', '"a'])
@pytest.mark.parametrize("schema", [{}, S, {**S, "maxLength": 5}, {**S, "minLength": 1}, {**S, "pattern": "^"}])
def test_text_that_is_no_json_string_is_never_admitted(byte_compiler, schema, text):
    assert not admits(byte_compiler.compile(JSONSchema(json.dumps(schema))), text)


@pytest.mark.parametrize("content", [b"\xed\xa0\x80", b"\xff", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xe4\xbd"])
@pytest.mark.parametrize("schema", [{}, S, {**S, "maxLength": 9}, {"type": "object", "additionalProperties": S}])
def test_bytes_that_are_no_utf_8_are_never_admitted(byte_compiler, schema, content):
    grammar = byte_compiler.compile(JSONSchema(json.dumps(schema)))
    assert not grammar.matcher().accept_text(b'"' + content + b'"')
    assert not grammar.matcher().accept_text(b'{"' + content + b'":')


def test_a_surrogate_pair_is_one_character(byte_compiler):
    grammar = byte_compiler.compile(JSONSchema('{"type":"string","maxLength":1}'))
    assert admits(grammar, '"\\ud83d\\ude00"')
    assert not admits(grammar, '"\\ud83d\\ude00\\ud83d\\ude00"')


def test_an_escaped_spelling_of_a_named_key_is_no_extra_key(byte_compiler):
    schema = {"properties": {"id": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    grammar = byte_compiler.compile(JSONSchema(json.dumps(schema)))
    assert not grammar.matcher().accept_text(b'{"\\u0069d":"')
    assert not grammar.matcher().accept_text(b'{"id":"')
    assert grammar.matcher().accept_text(b'{"idx":"')


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ('{"type":"strin"}', "/type"),
        ('{"properties":{"a":{"minimum":"x"}}}', "/properties/a/minimum"),
        ('{"properties":{"a":{"$ref":"#/$defs/no"}}}', "/properties/a/$ref"),
        ("[1]", ""),
        ("{", ""),
        ('{"const":NaN}', ""),
        ('{"const":"\\ud800"}', ""),
        ('{"enum":[1],"type":"string"}', ""),
    ],
)
def test_a_wrong_schema_is_refused_with_the_place(byte_compiler, schema, pointer):
    with pytest.raises(InvalidSchemaError, match=re.escape(pointer or "root")) as refused:
        byte_compiler.compile(JSONSchema(schema))
    assert refused.value.pointer == pointer


@pytest.mark.parametrize("reference", ["https://example.org/x.json", "other.json", "#name", "file:///etc/passwd"])
def test_only_local_references_are_followed(byte_compiler, reference):
    with pytest.raises(UnsupportedSchemaError, match="ref"):
        byte_compiler.compile(JSONSchema(json.dumps({"$ref": reference})))


def chained(count):
    definitions = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(count)}
    return json.dumps({"$ref": "#/$defs/0", "$defs": {**definitions, str(count): {}}})


def nested(depth):
    return '{"items":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    "schema",
    [
        nested(2_000),
        nested(20_000),
        json.dumps({"enum": list(range(6_000))}),
        json.dumps({"properties": {f"p{i}": {} for i in range(6_000)}}),
        json.dumps({"type": "array", "minItems": 10**9}),
        json.dumps({"description": "x" * 300_000}),
        json.dumps({"allOf": [{"anyOf": [{"minimum": i * 10 + j} for j in range(8)]} for i in range(9)]}),
        json.dumps({"type": "string", "pattern": "x" * 5_000}),
        chained(999),
    ],
    ids=range(9),
)
def test_hostile_schemas_are_refused_early(byte_compiler, schema):
    with pytest.raises(GrammarTooLargeError):
        byte_compiler.compile(JSONSchema(schema))


@pytest.mark.parametrize("pattern", ["^(a+)+$", "(a|a)*b", "^((a{1,9}){1,9}){1,9}$", "^[a-z]{4000}$", "((((a*)*)*)*)*"])
def test_hostile_patterns_take_no_time(byte_compiler, pattern):
    schema = {"enum": ["a" * 5_000 + "!", 1], "pattern": pattern}
    try:
        grammar = byte_compiler.compile(JSONSchema(json.dumps(schema)))
        byte_compiler.compile(JSONSchema(json.dumps({"type": "string", "pattern": pattern})))
    except GrammarError:
        return
    assert admits(grammar, "1")


def test_the_checker_here_agrees_on_the_rows():
    for schema, valid, invalid, listed in ROWS:
        cls = jsonschema.Draft202012Validator
        if isinstance(schema.get("items"), list) or schema.get("exclusiveMinimum") is True:
            continue
        assert all(cls(schema).is_valid(value) for value in valid), schema
        if not listed and "type" in schema and "format" not in schema:
            assert not any(cls(schema).is_valid(value) for value in invalid), schema
