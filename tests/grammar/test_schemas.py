"""What a schema's grammar admits is JSON that satisfies the schema, and the mask is what accept says."""

import json
import random

import jsonschema
import pytest
from generators.schemas import schemas
from hypothesis import given, settings
from hypothesis import strategies as st
from support.walks import legal_ids, text_of, write

from treadle.grammar import InvalidSchemaError, JSONSchema

SCHEMAS = schemas(200)


def validator(schema):
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("start", range(0, 200, 20))
def test_every_random_text_of_a_schema_satisfies_it(compiler, vocabulary, start):
    for number in range(start, start + 20):
        schema = SCHEMAS[number]
        grammar = compiler.compile(JSONSchema(json.dumps(schema)))
        for seed in range(2):
            _, ids = write(grammar, vocabulary, random.Random(seed), free_steps=30)
            text = text_of(ids, vocabulary).decode()
            errors = [e.message for e in validator(schema).iter_errors(json.loads(text))]
            assert grammar.unenforced or not errors, (number, schema, text, errors)


def test_few_of_the_random_schemas_have_keywords_that_are_not_enforced(compiler):
    open_ended = [s for s in SCHEMAS if compiler.compile(JSONSchema(json.dumps(s))).unenforced]
    assert len(open_ended) <= 6, open_ended


@pytest.mark.parametrize("number", range(0, 200, 9))
def test_a_bit_is_set_exactly_where_accept_succeeds(byte_compiler, byte_vocabulary, number):
    grammar = byte_compiler.compile(JSONSchema(json.dumps(SCHEMAS[number])))
    rng = random.Random(number)
    _, ids = write(grammar, byte_vocabulary, rng, free_steps=25)
    matcher = grammar.matcher()
    for token_id in ids[:40]:
        legal = set(legal_ids(matcher, byte_vocabulary).tolist())
        for candidate in range(byte_vocabulary.size):
            accepted = matcher.accept(candidate)
            assert accepted == (candidate in legal), (candidate, legal)
            if accepted:
                matcher.rollback(1)
        assert matcher.accept(token_id)


def test_bits_and_accept_agree_in_a_real_vocabulary(compiler, vocabulary):
    rng = random.Random(5)
    for schema in SCHEMAS[:30]:
        grammar = compiler.compile(JSONSchema(json.dumps(schema)))
        _, ids = write(grammar, vocabulary, rng, free_steps=20)
        matcher = grammar.matcher()
        for step, token_id in enumerate(ids[:12]):
            legal = set(legal_ids(matcher, vocabulary).tolist())
            tried = set(rng.sample(range(vocabulary.size), 60))
            tried |= (
                legal if step % 6 == 0 and len(legal) < 3000 else set(rng.sample(sorted(legal), min(60, len(legal))))
            )
            for candidate in tried:
                accepted = matcher.accept(candidate)
                assert accepted == (candidate in legal), (schema, vocabulary.content_bytes[candidate])
                if accepted:
                    matcher.rollback(1)
            assert matcher.accept(token_id)


def test_no_white_space_stands_between_elements(compiler, vocabulary):
    schema = {"type": "object", "properties": {"any": {}, "list": {"type": "array"}}, "required": ["any", "list"]}
    grammar = compiler.compile(JSONSchema(json.dumps(schema)))
    for seed in range(10):
        _, ids = write(grammar, vocabulary, random.Random(seed))
        text = text_of(ids, vocabulary).decode()
        outside = "".join(part for i, part in enumerate(json_parts(text)) if i % 2 == 0)
        assert not any(char.isspace() for char in outside), text


def json_parts(text):
    """The text outside and inside of strings, in turn."""
    parts, escape = [""], False
    for char in text:
        if char == '"' and not escape:
            parts.append("")
        else:
            parts[-1] += char
        escape = char == "\\" and not escape
    return parts


@settings(max_examples=60, deadline=None)
@given(number=st.integers(0, 199), seed=st.integers(0, 3), cut=st.floats(0, 1), depth=st.integers(1, 30))
def test_forks_and_rollbacks_change_nothing(byte_compiler, byte_vocabulary, number, seed, cut, depth):
    grammar = byte_compiler.compile(JSONSchema(json.dumps(SCHEMAS[number])))
    _, ids = write(grammar, byte_vocabulary, random.Random(seed), free_steps=20)
    ids = [*ids, 256]
    at = int(cut * len(ids))
    matcher = grammar.matcher()
    for token_id in ids[:at]:
        assert matcher.accept(token_id)
    legal = None if matcher.is_done else legal_ids(matcher, byte_vocabulary).tolist()
    fork = matcher.fork()
    for token_id in ids[at:]:
        assert fork.accept(token_id)
    assert fork.is_done
    back = min(depth, len(ids) - at)
    fork.rollback(back)
    fresh = grammar.matcher()
    for token_id in ids[: len(ids) - back]:
        assert fresh.accept(token_id)
    for one, other in ((fork, fresh), (matcher, None)):
        expected = legal if other is None else None if other.is_done else legal_ids(other, byte_vocabulary).tolist()
        assert expected == (None if one.is_done else legal_ids(one, byte_vocabulary).tolist())
    past = min(depth, at)
    matcher.rollback(past)
    for token_id in ids[at - past :]:
        assert matcher.accept(token_id)


def test_what_must_come_next_is_told(byte_compiler):
    grammar = byte_compiler.compile(JSONSchema('{"properties":{"answer":{"type":"boolean"}},"required":["answer"]}'))
    matcher = grammar.matcher()
    assert matcher.forced() == '{"answer":'
    for byte in b'{"answer":t':
        assert matcher.accept(byte)
    assert matcher.forced() == "rue}"


def test_what_must_come_next_is_whole_characters(byte_compiler):
    matcher = byte_compiler.compile(JSONSchema('{"enum":["né","nè"]}')).matcher()
    assert matcher.forced() == '"n'
    for byte in b'"n\xc3':
        assert matcher.accept(byte)
    assert matcher.forced() == ""


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "enum": [1, 2]},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"$ref": "#"},
        {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        {"minimum": 3, "maximum": 2, "type": "integer"},
        False,
    ],
)
def test_a_schema_that_nothing_satisfies_is_refused(compiler, schema):
    with pytest.raises(InvalidSchemaError):
        compiler.compile(JSONSchema(json.dumps(schema)))
