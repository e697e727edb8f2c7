"""Validation in words, and patterns that are found as the standard library finds them, but in bounded time."""

import re
import time
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.grammar import InvalidSchemaError, UnsupportedSchemaError
from treadle.grammar.matching import Automaton, is_found
from treadle.grammar.numbers import Bound, integers, numbers
from treadle.grammar.pattern import parse
from treadle.grammar.validate import Validator

SCHEMA = '{"type":"object","properties":{"a/b":{"type":"array","items":{"type":"integer"}}},"required":["a/b"]}'


def test_errors_say_where_and_what():
    assert Validator(SCHEMA).errors({"a/b": [1]}) == []
    assert Validator(SCHEMA).errors({"a/b": [1, "x"]}) == ["at /a~1b/1: 'x' is not of type 'integer'"]
    assert Validator(SCHEMA).text_errors("{}") == ["'a/b' is a required property"]
    assert Validator(SCHEMA).text_errors("{")[0].startswith("it is no JSON text")


def test_an_error_is_one_line_of_bounded_length_and_so_is_their_number():
    lines = Validator('{"items":{"const":1}}').errors(["line\n" * 1000] * 100)
    assert len(lines) == 8 and all("\n" not in line and len(line) < 400 for line in lines)


def test_formats_are_checked_only_if_asked_for():
    assert Validator('{"format":"ipv4"}').errors("no address") == []
    assert Validator('{"format":"ipv4"}', formats=True).errors("no address") == ["'no address' is not a 'ipv4'"]


def test_a_violation_has_keyword_pointer_and_value():
    (found,) = Validator('{"items":{"items":{"multipleOf":2}}}').violations([[2], [4, 3]])
    assert (found.keyword, found.pointer, found.value) == ("multipleOf", "/1/1", 3)


def test_the_dialect_is_that_of_the_schema():
    assert Validator('{"items":[{"type":"string"}]}').errors([1]) != []
    assert Validator('{"minimum":1,"exclusiveMinimum":true}').errors(1) != []
    assert Validator('{"prefixItems":[{"type":"string"}]}').errors([1]) != []


def test_remote_references_are_refused_and_endless_ones_found_out():
    with pytest.raises(UnsupportedSchemaError):
        Validator('{"$ref":"https://example.org/schema"}')
    with pytest.raises(InvalidSchemaError):
        Validator('{"$ref":"#"}').errors(1)


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(a|a)*$", "^((a{1,9}){1,9}){1,9}$", "a*a*a*a*a*a*a*b"])
def test_no_pattern_takes_for_ever(pattern):
    validator = Validator(f'{{"pattern":"{pattern}"}}')
    started = time.perf_counter()
    assert validator.errors("a" * 3_000 + "!") != []
    assert time.perf_counter() - started < 5


def test_a_pattern_that_cannot_be_bounded_is_refused():
    with pytest.raises(UnsupportedSchemaError, match="nested"):
        Validator('{"pattern":"^(?=(a+)+$)"}')


PATTERNS = [
    "^(a+)+$",
    "(ab|b)*c",
    "^(?:[a-c]+\\.)*[a-c]+$",
    "(a{2,3}){2,40}b",
    "^(a|b)*?$|cc",
    "x(a*b*)*y$",
    "a|^b$|c$",
]


@settings(deadline=None)
@given(st.sampled_from(PATTERNS), st.text("abcxy.", max_size=12))
def test_following_states_finds_what_backtracking_finds(pattern, text):
    automata = [Automaton(b.node, from_start=b.from_start, to_end=b.to_end) for b in parse(pattern)]
    assert any(automaton.is_found(text) for automaton in automata) == (re.search(pattern, text) is not None)
    assert is_found(pattern, text) == (re.search(pattern, text) is not None)


def as_regex(fragment):
    """A fragment of literals, classes and repetitions as a regular expression."""
    return re.sub(r'"([^"]*)"', lambda found: f"(?:{re.escape(found[1])})", fragment).replace(" ", "")


def within(value, low, high):
    above = low is None or (value > low.value if low.open else value >= low.value)
    return above and (high is None or (value < high.value if high.open else value <= high.value))


decimals = st.decimals(-20_000, 20_000, places=3) | st.decimals(-2, 2, places=2) | st.integers(-30, 30).map(Decimal)
bounds = st.none() | st.builds(Bound, decimals, st.booleans())


@settings(deadline=None)
@given(bounds, bounds, st.lists(decimals, min_size=1, max_size=20))
def test_ranges_admit_only_what_is_within(low, high, values):
    values += [bound.value for bound in (low, high) if bound is not None]
    whole = [re.compile(as_regex(text)) for text in integers(low, high)]
    broken = [re.compile(as_regex(text)) for text in numbers(low, high)]
    for value in values:
        text = format(value.normalize() + 0, "f")
        if any(pattern.fullmatch(text) for pattern in broken):
            assert within(value, low, high), text
        if value == int(value):
            assert any(p.fullmatch(str(int(value))) for p in whole) == within(value, low, high)
