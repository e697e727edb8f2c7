"""A turn's text with tool calls, taken apart while it comes."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from treadle.grammar import ToolCall, TurnStream, render_tool_calls
from treadle.runtime.server.tool_pieces import ArgumentPiece, CallBegun, ContentPiece, ToolPieces

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.just('</tool_call>"}{\\'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(st.tuples(st.sampled_from(["add", "get_weather", 'say "}"']), st.dictionaries(st.text(), VALUES)))
TEXTS = st.sampled_from(["", "Let me see.", "a < b", "<tool", "one {\n two }", " "])


def taken(pieces):
    """Content, and the name and arguments of each call."""
    content, calls = "", []
    for piece in pieces:
        match piece:
            case ContentPiece(text):
                content += text
            case CallBegun(call, name):
                assert call == len(calls)
                calls.append([name, ""])
            case ArgumentPiece(call, text):
                assert call == len(calls) - 1 and text
                calls[call][1] += text
    return content, [tuple(call) for call in calls]


@given(TEXTS, CALLS, st.lists(st.integers(1, 9), min_size=1), st.booleans())
def test_however_the_text_is_cut_it_says_the_same_as_its_blocks(before, calls, cuts, ascii_only):
    written = [
        ToolCall(i, name, json.dumps(arguments, ensure_ascii=ascii_only)) for i, (name, arguments) in enumerate(calls)
    ]
    text = before + render_tool_calls(written)
    pieces, stream, position, turn = [], ToolPieces(), 0, 0
    while position < len(text):
        length = cuts[turn % len(cuts)]
        pieces += stream.push(text[position : position + length])
        position, turn = position + length, turn + 1
    content, found = taken([*pieces, *stream.finish()])
    whole = TurnStream()
    deltas = [whole.push(text), whole.finish()]
    assert content == "".join(delta.content for delta in deltas)
    assert found == [(call.name, call.arguments) for call in written]
    assert stream.num_calls == len(written)


def test_a_call_is_told_as_soon_as_its_name_is_there_and_arguments_as_they_come():
    stream = ToolPieces()
    assert stream.push('<tool_call>\n{"name": "add", "argu') == []
    assert stream.push('ments": {"a"') == [CallBegun(0, "add"), ArgumentPiece(0, '{"a"')]
    assert stream.push(": 1}") == [ArgumentPiece(0, ": 1}")]
    assert stream.push("}\n</tool_call>") == []
    assert stream.finish() == []


def test_a_call_that_is_cut_off_keeps_what_was_written():
    stream = ToolPieces()
    assert taken(stream.push('Hm.<tool_call>\n{"name": "add", "arguments": {"a": "x') + stream.finish()) == (
        "Hm.",
        [("add", '{"a": "x')],
    )
