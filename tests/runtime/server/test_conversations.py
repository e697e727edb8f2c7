"""Messages that say the same have one digest, however they are written; what was generated is kept within a bound."""

from __future__ import annotations

import pytest

from treadle.runtime.server.conversations import RecordedIds, digest_of, digests

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"content": "hi"}, {"content": [{"type": "text", "text": "hi"}]}),
        ({"content": None}, {"content": ""}),
        ({"content": ""}, {}),
        ({"content": "hi", "refusal": None, "annotations": []}, {"content": "hi"}),
        ({"tool_calls": [CALL]}, {"content": None, "tool_calls": [{**CALL, "index": 0}]}),
        (
            {"tool_calls": [CALL]},
            {"tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"b":2,"a":1}'}}]},
        ),
    ],
)
def test_two_ways_to_write_the_same(one, other):
    assert digest_of({"role": "assistant", **one}) == digest_of({"role": "assistant", **other})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}),
        ({"role": "user", "content": "hi"}, {"role": "user", "content": "hi "}),
        ({"role": "tool", "content": "1", "tool_call_id": "a"}, {"role": "tool", "content": "1", "tool_call_id": "b"}),
        ({"role": "assistant", "tool_calls": [CALL]}, {"role": "assistant", "tool_calls": [{**CALL, "id": "c2"}]}),
        ({"role": "user", "content": [{"type": "image", "text": None}]}, {"role": "user", "content": ""}),
    ],
)
def test_different_messages(one, other):
    assert digest_of(one) != digest_of(other)


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"content": 5},
        {"content": "\ud800"},
        {"tool_calls": ["x"]},
        {"tool_calls": [{"function": {"arguments": "["}}]},
    ],
)
def test_any_message_has_a_digest(message):
    assert len(digest_of(message)) == 16


def test_deep_arguments_have_a_digest():
    call = {"id": "c", "function": {"name": "f", "arguments": "[" * 100_000}}
    assert len(digest_of({"role": "assistant", "tool_calls": [call]})) == 16


def test_a_digest_is_of_all_that_came_before():
    hi, ho = {"role": "user", "content": "hi"}, {"role": "user", "content": "ho"}
    assert next(digests([hi, ho])) == next(digests([hi]))
    assert list(digests([hi, ho]))[1] != list(digests([ho, hi]))[1]


def test_ids_are_found_by_program_and_message():
    recorded, said = RecordedIds(), {"role": "assistant", "content": "yes"}
    recorded.put("p", said, [1, 2, 3])
    assert recorded.get("p", {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}) == (1, 2, 3)
    assert recorded.get("q", said) is None
    recorded.forget("p")
    assert recorded.get("p", said) is None and len(recorded) == 0


def test_beyond_the_bound_the_oldest_go():
    recorded = RecordedIds(most=10)
    for index in range(100):
        recorded.put(f"p{index % 3}", {"content": str(index)}, [index] * 4)
    assert len(recorded) == 8
    assert recorded.get("p0", {"content": "99"}) == (99,) * 4
    for program in ("p0", "p1", "p2"):
        recorded.forget(program)
    assert len(recorded) == 0


def test_messages_without_ids_are_not_kept():
    recorded = RecordedIds(most=10)
    for index in range(100):
        recorded.put("p", {"content": str(index)}, [])
    assert not recorded._ids and recorded.get("p", {"content": "0"}) is None
    recorded.put("p", {"content": "a"}, [1])
    recorded.put("p", {"content": "a"}, [])
    assert recorded.get("p", {"content": "a"}) is None


def test_what_is_recorded_again_counts_once():
    recorded = RecordedIds()
    for _ in range(3):
        recorded.put("p", {"content": "a"}, [1, 2])
    assert len(recorded) == 2
