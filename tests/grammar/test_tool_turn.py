"""A turn with tools: which tokens may come, when a call is known, and that every border falls between tokens."""

import json
import random

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.walks import legal_ids, text_of, write

from treadle.grammar import InvalidGrammarError, JSONSchema, ToolSpec, ToolTurn, TurnStream, render_tool_calls
from treadle.grammar.validate import Validator


def tool(name, required=True, **properties):
    schema = {"type": "object", "properties": properties, "required": list(properties) if required else []}
    return ToolSpec(name, f"does {name}", json.dumps(schema))


GET = tool("get", city={"type": "string", "maxLength": 12})
GET_MORE = tool("get_more", count={"type": "integer", "minimum": 1, "maximum": 99}, unit={"enum": ["a", "b"]})
QUOTED = tool('na"me é', flag={"type": "boolean"})
FREE_FORM = tool("run", command={"type": "string"})
NO_ARGUMENTS = ToolSpec("stop")
TOOLS = (GET, GET_MORE, QUOTED, NO_ARGUMENTS)
ANSWER = JSONSchema('{"type":"object","properties":{"ok":{"type":"boolean"}},"required":["ok"]}')
TURNS = [
    ToolTurn(TOOLS),
    ToolTurn(TOOLS, "required"),
    ToolTurn((GET,), "required", parallel=False),
    ToolTurn(TOOLS, answer=ANSWER),
    ToolTurn(TOOLS, parallel=False),
    ToolTurn((FREE_FORM, GET), answer=ANSWER, parallel=False),
]


@pytest.fixture(params=["plain", "tagged", "bytes"])
def engine(request):
    prefix = {"plain": "", "tagged": "tagged_", "bytes": "byte_"}[request.param]
    return request.getfixturevalue(f"{prefix}compiler"), request.getfixturevalue(f"{prefix}vocabulary")


def encode(vocabulary, text):
    """Ids that spell a text, the longest tokens first, tags as tokens of their own where there are any."""
    raw, ids = text.encode(), []
    longest = {vocabulary.token_bytes[i]: i for i in reversed(range(len(vocabulary.token_bytes)))}
    special = {vocabulary.token_bytes[i] for i in vocabulary.special_ids}
    while raw:
        length = next(n for n in range(min(24, len(raw)), 0, -1) if raw[:n] in longest and raw[:n] not in special)
        ids.append(longest[raw[:length]])
        raw = raw[length:]
    return ids


def feed(matcher, vocabulary, text):
    """Writes a text with the longest tokens that the matcher accepts."""
    raw = text.encode()
    ids_of = {}
    for i, piece in enumerate(vocabulary.token_bytes):
        if i not in vocabulary.special_ids:
            ids_of.setdefault(piece, i)
    written = []
    while raw:
        for length in range(min(24, len(raw)), 0, -1):
            token_id = ids_of.get(raw[:length])
            if token_id is not None and matcher.accept(token_id):
                written.append(token_id)
                raw = raw[length:]
                break
        else:
            return None
    return written


def read(pieces):
    stream = TurnStream()
    deltas = [stream.push(piece) for piece in pieces] + [stream.finish()]
    return "".join(delta.content for delta in deltas), tuple(call for delta in deltas for call in delta.calls)


CALL = '<tool_call>\n{"name": "get", "arguments": {"city": "Bonn"}}\n</tool_call>'
MORE = '<tool_call>\n{"name": "get_more", "arguments": {"count": 12, "unit": "b"}}\n</tool_call>'


@pytest.mark.parametrize("turn", TURNS, ids=range(len(TURNS)))
def test_random_turns_are_of_the_form_that_was_asked_for(engine, turn):
    compiler, vocabulary = engine
    grammar = compiler.compile(turn)
    schemas = {one.name: json.loads(one.parameters) for one in turn.tools}
    seen = 0
    for seed in range(12):
        matcher, ids = write(grammar, vocabulary, random.Random(seed), free_steps=60)
        raw = text_of(ids, vocabulary)
        content, calls = read([raw.decode(errors="replace")])
        assert calls == matcher.calls
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
        seen += len(calls)
        if turn.mode == "required":
            assert calls and content == ""
        if not turn.parallel:
            assert len(calls) <= 1
        if turn.answer is not None:
            assert (content == "") == bool(calls)
            assert calls or Validator(turn.answer.schema).text_errors(content) == []
    assert seen or turn.mode == "auto"


@pytest.mark.parametrize("turn", TURNS, ids=range(len(TURNS)))
def test_a_bit_is_set_exactly_where_accept_succeeds(byte_compiler, byte_vocabulary, turn):
    grammar = byte_compiler.compile(turn)
    texts = [CALL, f"{CALL}\n{MORE}", f"so <tool> {MORE}", '{"ok":true}', CALL.replace("get", "run")]
    for text in texts:
        matcher = grammar.matcher()
        for token_id in text.encode():
            legal = set(legal_ids(matcher, byte_vocabulary).tolist())
            for candidate in range(byte_vocabulary.size):
                accepted = matcher.accept(candidate)
                assert accepted == (candidate in legal), (candidate, byte_vocabulary.content_bytes[candidate])
                if accepted:
                    matcher.rollback(1)
            if not matcher.accept(token_id):
                break


def test_bits_and_accept_agree_along_a_real_turn(engine):
    compiler, vocabulary = engine
    rng = random.Random(1)
    matcher = compiler.compile(ToolTurn(TOOLS)).matcher()
    for token_id in feed(matcher.fork(), vocabulary, f"Let me see.{CALL}\n{MORE}"):
        legal = legal_ids(matcher, vocabulary).tolist()
        allowed = set(legal)
        for candidate in {*rng.sample(range(vocabulary.size), 80), *rng.sample(legal, min(60, len(legal)))}:
            accepted = matcher.accept(candidate)
            assert accepted == (candidate in allowed), vocabulary.content_bytes[candidate]
            if accepted:
                matcher.rollback(1)
        assert matcher.accept(token_id)


def test_two_calls_in_a_turn_are_known_as_they_close(engine):
    compiler, vocabulary = engine
    matcher = compiler.compile(ToolTurn(TOOLS)).matcher()
    assert feed(matcher, vocabulary, f"Sure. {CALL}") is not None
    assert [(call.index, call.name, call.arguments) for call in matcher.calls] == [(0, "get", '{"city": "Bonn"}')]
    assert matcher.can_end
    assert feed(matcher, vocabulary, f"\n{MORE}") is not None
    assert [call.name for call in matcher.calls] == ["get", "get_more"]
    assert read([f"Sure. {CALL}\n{MORE}"]) == ("Sure. ", matcher.calls)


def test_a_tool_is_known_as_soon_as_its_name_is_certain(byte_compiler):
    matcher = byte_compiler.compile(ToolTurn(TOOLS, "required")).matcher()
    assert matcher.forced() == "<tool_call>"
    for byte in b"<tool_call>":
        assert matcher.accept(byte)
    assert matcher.forced() == '\n{"name": "'
    for byte in b'\n{"name": "':
        assert matcher.accept(byte)
    assert matcher.accept(ord("g"))
    assert (matcher.forced(), matcher.tool_name) == ("et", None)
    for byte in b"et":
        assert matcher.accept(byte)
    assert (matcher.forced(), matcher.tool_name) == ("", None)
    other = matcher.fork()
    assert matcher.accept(ord('"')) and matcher.tool_name == "get"
    assert matcher.forced().startswith(', "arguments": {"city": "')
    assert other.accept(ord("_")) and other.tool_name == "get_more"


def test_no_special_token_and_no_tag_is_legal_inside_arguments(engine):
    compiler, vocabulary = engine
    matcher = compiler.compile(ToolTurn((FREE_FORM,), "required")).matcher()
    assert feed(matcher, vocabulary, '<tool_call>\n{"name": "run", "arguments": {"command": "ls') is not None
    legal = set(legal_ids(matcher, vocabulary).tolist())
    tags = {i for i, text in enumerate(vocabulary.token_bytes) if text in (b"<tool_call>", b"</tool_call>")}
    assert not legal & (vocabulary.special_ids | tags | set(vocabulary.stop_ids))


def test_special_tokens_are_no_free_text(engine):
    compiler, vocabulary = engine
    legal = set(legal_ids(compiler.compile(ToolTurn(TOOLS)).matcher(), vocabulary).tolist())
    assert legal & vocabulary.special_ids == set(vocabulary.stop_ids) & vocabulary.special_ids
    assert legal.issuperset(vocabulary.open_ids)


def test_no_token_runs_past_the_opening_tag(byte_compiler, byte_vocabulary):
    matcher = byte_compiler.compile(ToolTurn(TOOLS)).matcher()
    for byte in b"x <tool_":
        assert matcher.accept(byte)
    crossing = byte_vocabulary.token_bytes.index(b"call>x")
    ending = byte_vocabulary.token_bytes.index(b"call>")
    assert not matcher.accept(crossing)
    assert matcher.accept(ending)
    assert not matcher.can_end


def test_after_the_only_call_that_is_allowed_nothing_but_the_end_follows(engine):
    compiler, vocabulary = engine
    matcher = compiler.compile(ToolTurn(TOOLS, parallel=False)).matcher()
    assert feed(matcher, vocabulary, CALL) is not None
    assert set(legal_ids(matcher, vocabulary).tolist()) == set(vocabulary.stop_ids)


@settings(max_examples=60, deadline=None)
@given(number=st.integers(0, len(TURNS) - 1), seed=st.integers(0, 5), cut=st.floats(0, 1), back=st.integers(0, 80))
def test_forks_and_rollbacks_change_nothing(byte_compiler, byte_vocabulary, number, seed, cut, back):
    grammar = byte_compiler.compile(TURNS[number])
    _, ids = write(grammar, byte_vocabulary, random.Random(seed), free_steps=40)
    if number == 0:
        ids = list(f"ab {CALL}\n{MORE} <tool".encode())
    ids = [*ids, 256]
    at = int(cut * len(ids))
    matcher = grammar.matcher()
    for token_id in ids[:at]:
        assert matcher.accept(token_id)
    fork = matcher.fork()
    for token_id in ids[at:]:
        assert fork.accept(token_id)
    back = min(back, len(ids))
    fork.rollback(back)
    fresh = grammar.matcher()
    for token_id in ids[: len(ids) - back]:
        assert fresh.accept(token_id)
    assert view(fork, byte_vocabulary) == view(fresh, byte_vocabulary)
    for token_id in ids[len(ids) - back :]:
        assert fork.accept(token_id)
    assert fork.is_done
    for token_id in ids[at:]:
        assert matcher.accept(token_id)
    assert view(matcher, byte_vocabulary) == view(fork, byte_vocabulary)


def view(matcher, vocabulary):
    legal = None if matcher.is_done else legal_ids(matcher, vocabulary).tolist()
    return legal, matcher.calls, matcher.tool_name, matcher.can_end, matcher.is_done, matcher.forced()


def test_streamed_equals_unstreamed_for_any_grouping_of_tokens(compiler, vocabulary, tokenizer):
    grammar = compiler.compile(ToolTurn((*TOOLS, FREE_FORM)))
    text = f"On it <tool <tool_cal {CALL}\n{CALL.replace('Bonn', 'a<b')} then {MORE}"
    matcher = grammar.matcher()
    ids = feed(matcher, vocabulary, text)
    whole = read([tokenizer.decode(ids)])
    assert whole[1] == matcher.calls and len(whole[1]) == 3
    rng = random.Random(0)
    for _ in range(100):
        cuts = sorted(rng.sample(range(len(ids)), rng.randrange(len(ids))))
        decode = tokenizer.detokenizer()
        pieces = [decode.push(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
        assert read([*pieces, decode.finish()]) == whole


def test_rendered_calls_are_what_the_grammar_admits(byte_compiler, byte_vocabulary):
    matcher = byte_compiler.compile(ToolTurn((*TOOLS, FREE_FORM), "required")).matcher()
    _, ids = write(byte_compiler.compile(ToolTurn(TOOLS, "required")), byte_vocabulary, random.Random(3))
    _, calls = read([text_of(ids, byte_vocabulary).decode()])
    for byte in render_tool_calls(calls).encode():
        assert matcher.accept(byte)
    assert matcher.calls == calls


@pytest.mark.parametrize("tools", [(), (GET, GET), (ToolSpec(""),), (ToolSpec("\ud800"),)])
def test_a_turn_needs_tools_with_names_of_their_own(compiler, tools):
    with pytest.raises(InvalidGrammarError, match="tool"):
        compiler.compile(ToolTurn(tools))


def test_what_is_not_enforced_is_listed_by_tool(compiler):
    loose = ToolSpec("loose", "", '{"type":"object","properties":{"n":{"type":"integer","multipleOf":3}}}')
    grammar = compiler.compile(ToolTurn((GET, loose)))
    assert grammar.unenforced == ("/tools/1/parameters/properties/n/multipleOf",)
