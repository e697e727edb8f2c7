"""What is written to the wire is read from it again, exactly."""

from __future__ import annotations

import math
from array import array
from typing import get_args, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.runtime.engine.wire import LENGTH_BYTES, Message, decode, encode, framed
from treadle.scheduler import DeclareNode, Inspected, SamplingParams, SubmitCall

INTEGERS = st.integers(-(2**63), 2**63 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
st.register_type_strategy(int, INTEGERS)
st.register_type_strategy(float, st.floats(allow_nan=False))


def messages(kind):
    """Any values of a message's fields, as their annotations have them."""
    given = {}
    for name, hint in get_type_hints(kind).items():
        if hint == dict[str, object] or str(hint) == "dict[str, typing.Any]":
            given[name] = st.dictionaries(st.text(), JSON)
        elif name == "token_ids":
            given[name] = st.lists(INTEGERS).map(tuple)
        else:
            given[name] = st.from_type(hint)
    return st.builds(kind, **given)


@pytest.mark.parametrize("kind", get_args(Message), ids=lambda kind: kind.__name__)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_message_comes_back_as_it_was(kind, data):
    batch = tuple(data.draw(st.lists(messages(kind), max_size=3)))
    back = decode(encode(batch))
    assert back == batch
    assert [type(message) for message in back] == [kind] * len(batch)


@settings(max_examples=50, deadline=None)
@given(batch=st.lists(st.one_of(*map(messages, get_args(Message))), max_size=6).map(tuple))
def test_messages_of_many_kinds_keep_their_order(batch):
    assert decode(encode(batch)) == batch


def test_the_values_inside_keep_their_types():
    submit = SubmitCall("c", "p", (1,), SamplingParams(logit_bias=((3, -math.inf),), stop=("a",)))
    (back,) = decode(encode([submit]))
    assert type(back.token_ids) is type(back.sampling.stop) is type(back.sampling.logit_bias[0]) is tuple
    assert type(back.sampling) is SamplingParams


def test_tokens_may_be_given_in_any_sequence():
    for tokens in ([1, 2], array("i", (1, 2)), (1, 2)):
        (back,) = decode(encode([SubmitCall("c", "p", tokens)]))
        assert back.token_ids == (1, 2)


def test_not_a_number_comes_back_as_such():
    (back,) = decode(encode([SubmitCall("c", "p", (1,), SamplingParams(temperature=math.nan))]))
    assert math.isnan(back.sampling.temperature)


@pytest.mark.parametrize(
    "message",
    [
        DeclareNode("p", "half a pair \ud800", "tool"),
        SubmitCall("c", "p", (1,), SamplingParams(seed=2**70)),
        SubmitCall("c", "p", (object(),)),
        Inspected("r", {"set": object()}),
    ],
)
def test_what_cannot_be_written_is_refused(message):
    with pytest.raises(ValueError, match=r"."):
        encode([message])


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x91\x91\x63", b"\x91\x92\x00\x00", encode([])[:0] + b"\xc1"])
def test_bytes_that_are_no_batch_are_refused(data):
    with pytest.raises(msgspec.DecodeError):
        decode(data)


def test_a_frame_begins_with_its_length():
    frame = framed([DeclareNode("p", "n", "tool")])
    assert int.from_bytes(frame[:LENGTH_BYTES], "big") == len(frame) - LENGTH_BYTES
