"""Compiling: once for each constraint, within bounds, off the event loop and in time; other kinds of constraint."""

import asyncio
import json
import random
import re
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.walks import legal_ids, text_of, write

from treadle.grammar import (
    EBNF,
    Choice,
    GrammarError,
    GrammarTimeoutError,
    GrammarTooLargeError,
    InvalidGrammarError,
    JSONSchema,
    Regex,
    ToolSpec,
    ToolTurn,
    constraint_from_json,
    constraint_to_json,
)
from treadle.grammar.compiler import Compiler
from treadle.grammar.vocabulary import Vocabulary


def schema(number, **more):
    properties = {f"field_{number}": {"type": "string", **more}}
    return JSONSchema(json.dumps({"type": "object", "properties": properties}))


def test_a_constraint_is_compiled_once_for_all_threads(byte_vocabulary, monkeypatch):
    compiler = Compiler(byte_vocabulary)
    compiled = []
    work = Compiler._compile

    def slow(self, source, salt):
        compiled.append(source)
        time.sleep(0.05)
        return work(self, source, salt)

    monkeypatch.setattr(Compiler, "_compile", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(compiler.compile(schema(1)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1 and len(set(map(id, found))) == 1


def test_a_failure_is_told_to_every_waiter_and_not_kept(byte_vocabulary):
    compiler = Compiler(byte_vocabulary)
    for _ in range(2):
        with pytest.raises(InvalidGrammarError):
            compiler.compile(EBNF("root ::= ("))


def test_the_cache_stays_within_its_bytes(vocabulary):
    compiler = Compiler(vocabulary, cache_bytes=1 << 20)
    for number in range(60):
        compiler.compile(schema(number, minLength=1))
        assert compiler.cached_bytes <= 1 << 19
    assert compiler.cached_bytes > 0


def test_what_a_turn_holds_counts_once_for_as_long_as_it_is_held(byte_vocabulary):
    compiler = Compiler(byte_vocabulary)
    tools = tuple(ToolSpec(f"t{i}", "", schema(i).schema) for i in range(3))
    grammars = [compiler.compile(ToolTurn(tools)), compiler.compile(ToolTurn(tools[:2], "required"))]
    parts = sum(part.num_bytes for part in grammars[0].parts)
    keys = compiler.cached_bytes - parts - sum(grammar.num_bytes for grammar in grammars)
    assert 0 < keys < 4_096
    limit = grammars[0].num_bytes + parts + 2_048
    small = Compiler(byte_vocabulary, cache_bytes=2 * limit)
    for number in range(3):
        small.compile(ToolTurn(tools[number:] + tools[:number]))
        assert 0 < small.cached_bytes <= limit


def test_turns_share_the_grammars_of_their_tools(compiler):
    tools = [ToolSpec(f"tool_{i}", "", '{"type":"object","properties":{"x":{"type":"integer"}}}') for i in range(4)]
    one = compiler.compile(ToolTurn(tuple(tools)))
    other = compiler.compile(ToolTurn((tools[3], tools[1]), "required"))
    assert other.tools[0] is one.tools[3] and other.tools[1] is one.tools[1]


async def test_compiling_leaves_the_event_loop_free(vocabulary):
    compiler = Compiler(vocabulary)
    compiler.compile(Choice(("warm",)))
    work = asyncio.ensure_future(compiler.compile_async(schema(1, maxLength=200)))
    longest, before = 0.0, time.perf_counter()
    while not work.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
    assert (await work).matcher().forced() == "{"
    assert longest < 0.25
    compiler.close()


async def test_a_compile_that_takes_too_long_is_given_up_but_kept_once_done(vocabulary):
    compiler = Compiler(vocabulary)
    compiler.compile(Choice(("warm",)))
    slow = schema(2, maxLength=256)
    with pytest.raises(GrammarTimeoutError, match="later"):
        await compiler.compile_async(slow, timeout=0.01)
    await compiler.compile_async(slow, timeout=60)
    started = time.perf_counter()
    await compiler.compile_async(slow, timeout=0.01)
    assert time.perf_counter() - started < 0.01
    compiler.close()


@pytest.mark.parametrize(
    "pattern", [r"\d{3}-\d{4}", r"(yes|no)!?", r"[^a]b", r"^x.y$", r"\w{2,9}@\w{2}\.(com|org)", r'"\\\n?']
)
def test_text_of_a_regex_is_matched_by_it(byte_compiler, byte_vocabulary, pattern):
    grammar = byte_compiler.compile(Regex(pattern))
    for seed in range(5):
        _, ids = write(grammar, byte_vocabulary, random.Random(seed), free_steps=15)
        assert re.fullmatch(pattern, text_of(ids, byte_vocabulary).decode())


@pytest.mark.parametrize(
    "pattern", ["(", "[z-a]", "a**", "(?i)a", "(?=a)b", r"\bword", r"(a)\1", "a{3,1}", "x$y", "[]"]
)
def test_a_regex_that_cannot_be_followed_is_refused(byte_compiler, pattern):
    with pytest.raises(InvalidGrammarError, match="pattern"):
        byte_compiler.compile(Regex(pattern))


LARGE = [
    Regex("a{100000}"),
    Regex("((a{90}){90}){90}"),
    EBNF('root ::= "a"{1,999999}'),
    EBNF('root ::= ((("a"{1000}){1000}){1000})'),
    EBNF('root ::= a{1000}\na ::= b{1000}\nb ::= "b"'),
]


@pytest.mark.parametrize("constraint", LARGE)
def test_large_repetitions_are_refused(byte_compiler, constraint):
    with pytest.raises(GrammarTooLargeError):
        byte_compiler.compile(constraint)


def test_a_choice_is_one_of_its_options(byte_compiler, byte_vocabulary):
    options = ("", "a", "ab", 'q"\\\n', "é")
    grammar = byte_compiler.compile(Choice(options))
    written = {text_of(write(grammar, byte_vocabulary, random.Random(i))[1], byte_vocabulary) for i in range(60)}
    assert written == {option.encode() for option in options}


def test_a_grammar_of_ones_own(byte_compiler, byte_vocabulary):
    grammar = byte_compiler.compile(EBNF('root ::= "(" root ")" | "x"'))
    _, ids = write(grammar, byte_vocabulary, random.Random(4), free_steps=6)
    text = text_of(ids, byte_vocabulary).decode()
    assert text == "(" * (len(text) // 2) + "x" + ")" * (len(text) // 2)


@pytest.mark.parametrize(
    "constraint", [EBNF("root ::= ("), EBNF('start ::= "a"'), Choice(()), EBNF("\ud800"), Regex("\ud800")]
)
def test_what_is_no_grammar_is_refused(byte_compiler, constraint):
    with pytest.raises(InvalidGrammarError):
        byte_compiler.compile(constraint)


def test_once_complete_only_stop_tokens_are_legal(byte_compiler, byte_vocabulary):
    matcher = byte_compiler.compile(Choice(("ok",))).matcher()
    assert not matcher.can_end and not matcher.accept(256)
    assert matcher.accept(ord("o")) and matcher.accept(ord("k"))
    assert legal_ids(matcher, byte_vocabulary).tolist() == [256]
    assert matcher.can_end and matcher.accept(256) and matcher.is_done and not matcher.can_end
    assert not matcher.accept(256)
    matcher.rollback(1)
    assert matcher.can_end and not matcher.is_done


def test_a_vocabulary_without_a_stop_token_is_refused():
    with pytest.raises(ValueError, match="stop"):
        Vocabulary([b"a"], frozenset(), (), 1)


texts = st.text(st.characters(codec="utf-8"), max_size=8)
json_schemas = st.builds(JSONSchema, texts, st.booleans())
tools = st.builds(ToolSpec, texts, texts, texts)
constraints = st.one_of(
    json_schemas,
    st.builds(Regex, texts),
    st.builds(EBNF, texts),
    st.builds(Choice, st.lists(texts, max_size=3).map(tuple)),
    st.builds(
        ToolTurn,
        st.lists(tools, max_size=3).map(tuple),
        st.sampled_from(["auto", "required"]),
        st.none() | json_schemas,
        st.booleans(),
    ),
)


@settings(max_examples=80, deadline=None)
@given(constraints)
def test_the_wire_text_says_all(constraint):
    text = constraint_to_json(constraint)
    assert constraint_from_json(text) == constraint
    assert constraint_to_json(constraint_from_json(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"kind":"magic"}',
        '{"kind":"regex"}',
        '{"kind":"regex","pattern":1}',
        '{"kind":"regex","pattern":"a","flags":"i"}',
        '{"kind":"choice","options":"ab"}',
        '{"kind":"json_schema","schema":"{}","strict":1}',
        '{"kind":"tool_turn","tools":[{"name":"a"}]}',
        '{"kind":"tool_turn","tools":[],"mode":"none"}',
        "[" * 100_000,
    ],
)
def test_wire_text_that_says_nothing_is_refused(text):
    with pytest.raises(InvalidGrammarError, match="constraint_to_json"):
        constraint_from_json(text)


def test_what_one_tenant_compiled_is_not_there_for_another(byte_vocabulary):
    compiler, turn = Compiler(byte_vocabulary), ToolTurn((ToolSpec("look", "", "{}"),))
    for constraint in (schema(1), turn):
        ours = compiler.compile(constraint, "us")
        assert compiler.compile(constraint, "us") is ours
        assert compiler.compile(constraint, "them") is not ours
        assert compiler.compile(constraint) is not ours
    assert compiler.compile(turn, "us").parts[0] is not compiler.compile(turn, "them").parts[0]


def test_salts_and_constraints_are_told_apart(byte_vocabulary):
    compiler = Compiler(byte_vocabulary)
    assert compiler.compile(schema(11), "1") is not compiler.compile(schema(1), "11")


def test_a_grammar_that_is_compiled_soon_is_told_once(byte_vocabulary):
    compiler, told, there = Compiler(byte_vocabulary), [], threading.Event()

    def done(result):
        told.append(result)
        there.set()

    compiler.compile_soon(schema(1), done, "us")
    assert there.wait(60)
    assert told == [compiler.compile(schema(1), "us")]
    there.clear()
    compiler.compile_soon(JSONSchema("{"), done)
    assert there.wait(60)
    assert isinstance(told[1], GrammarError)


def test_a_grammar_that_takes_too_long_is_told_to_and_nothing_more(byte_vocabulary, monkeypatch):
    compiler, told, goes_on, ended = Compiler(byte_vocabulary), [], threading.Event(), threading.Event()
    work = Compiler._compile

    def slow(self, source, salt):
        goes_on.wait(60)
        try:
            return work(self, source, salt)
        finally:
            ended.set()

    monkeypatch.setattr(Compiler, "_compile", slow)
    compiler.compile_soon(schema(1), told.append, timeout=0.01)
    while not told:
        time.sleep(0.001)
    goes_on.set()
    assert ended.wait(60)
    compiler.compile(schema(1))
    assert [type(result) for result in told] == [GrammarTimeoutError]
