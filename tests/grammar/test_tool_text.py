"""Tool calls in text: found however the text is cut, malformed or not, and written back."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.grammar import ToolCall, TurnStream, render_tool_calls

PARTS = [
    "<tool_call>",
    "</tool_call>",
    "\n",
    '{"name": "f", "arguments": {"x": "',
    '"}}',
    "{}",
    '"',
    "\\",
    "<tool",
    "hi ",
]
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def read(pieces):
    stream = TurnStream()
    deltas = [stream.push(piece) for piece in pieces] + [stream.finish()]
    return "".join(delta.content for delta in deltas), tuple(call for delta in deltas for call in delta.calls)


@settings(deadline=None)
@given(st.lists(st.sampled_from([*PARTS, CALL]), max_size=14), st.lists(st.integers(0, 200), max_size=12))
def test_how_text_is_cut_makes_no_difference(parts, cuts):
    text = "".join(parts)
    cuts = sorted(min(cut, len(text)) for cut in cuts)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(pieces) == read([text]) == read(text)


def test_a_call_is_reported_with_the_last_character_of_its_block():
    stream = TurnStream()
    assert stream.push(CALL[:-1]).calls == ()
    assert stream.push(CALL[-1:]).calls == (ToolCall(0, "f", '{"x": 1}'),)


def test_only_what_may_be_a_tag_is_held_back():
    stream = TurnStream()
    assert stream.push("a < b <tool").content == "a < b "
    assert stream.push("box> c").content == "<toolbox> c"


def test_a_closing_tag_inside_a_string_is_part_of_the_arguments():
    arguments = json.dumps({"text": 'say "</tool_call>" and <tool_call>'})
    calls = (ToolCall(0, "f", arguments),)
    assert read([render_tool_calls(calls)]) == ("", calls)


def test_malformed_blocks_are_content_and_later_calls_are_found():
    broken = '<tool_call>{"name": f}</tool_call>'
    assert read([f"{broken} {CALL}"]) == (f"{broken} ", (ToolCall(0, "f", '{"x": 1}'),))
    assert read(["<tool_call>" + CALL]) == ("<tool_call>", (ToolCall(0, "f", '{"x": 1}'),))
    assert read([CALL[:-3]]) == (CALL[:-3], ())


def test_a_block_in_other_spacing_is_a_call_all_the_same():
    text = '<tool_call>{"arguments":{"b":[1,2]},"name":"g"}</tool_call>'
    assert read([text]) == ("", (ToolCall(0, "g", '{"b": [1, 2]}'),))


def test_white_space_between_calls_belongs_to_neither():
    assert read([f"{CALL}\n\n{CALL}\n"]) == ("", (ToolCall(0, "f", '{"x": 1}'), ToolCall(1, "f", '{"x": 1}')))
    assert read([f"{CALL}\nDone.\n"])[0] == "\nDone.\n"


names = st.text('ab "\\é_-.<>', min_size=1, max_size=8)
texts = st.text('ab"\\</tool_call>{}é\n\t😀', max_size=20)
values = st.recursive(st.none() | st.integers() | texts, lambda inner: st.lists(inner, max_size=3), max_leaves=4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(names, st.dictionaries(texts, values, max_size=3)), max_size=4))
def test_what_is_written_is_read_back(pairs):
    calls = tuple(ToolCall(i, name, json.dumps(arguments)) for i, (name, arguments) in enumerate(pairs))
    assert read([render_tool_calls(calls)]) == ("", calls)
