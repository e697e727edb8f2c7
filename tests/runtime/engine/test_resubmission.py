"""A call that comes with what it has generated elsewhere goes on as if it had been here all the time."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache

import pytest
from support.engines import GREEDY, Bench, Outcome, assert_same

from treadle.grammar import JSONSchema, Regex, ToolSpec, ToolTurn, constraint_to_json
from treadle.runtime.config import cache_dir
from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.models import SHAPES, RandomCheckpoint, resolve
from treadle.runtime.text.tokenizer import load_tokenizer
from treadle.scheduler import SamplingParams, SubmitCall

PROMPT = (5, 6, 7, 8, 9, 10, 11)
SAMPLED = SamplingParams(temperature=1.3, seed=7, logprobs=2)
WAYS = {
    "greedy": GREEDY,
    "seed": SAMPLED,
    "top k": replace(SAMPLED, top_k=5),
    "top p and min p": replace(SAMPLED, top_p=0.8, min_p=0.02),
    "repetition penalty": replace(GREEDY, repetition_penalty=1.5),
    "presence and frequency": replace(SAMPLED, presence_penalty=1.5, frequency_penalty=0.7),
    "bias": replace(SAMPLED, logit_bias=((17, 6.0), (23, 5.0))),
}


def whole(bench, params, max_tokens=24, prompt=PROMPT, **options) -> Outcome:
    bench.submit("whole", prompt, params, max_tokens=max_tokens, **options)
    return bench.run()["whole"]


def continued(bench, outcome, cut, params, max_tokens=24, prompt=PROMPT, **options) -> Outcome:
    """A call that has generated the first `cut` tokens of an outcome, and the rest of it here."""
    begun = tuple(outcome.token_ids[:cut])
    rest = bench.calls["rest"] = Outcome()
    submit = SubmitCall("rest", "program", (*prompt, *begun), params, max_tokens, num_generated=cut, **options)
    bench.send(submit)
    bench.run()
    bench.assert_nothing_leaks()
    return Outcome([*begun, *rest.token_ids], [*outcome.logprobs[:cut], *rest.logprobs], rest.text, rest.end)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 9, 23])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_and_logprobs_are_those_of_the_undisturbed_call(way, cut, overlap):
    expected = whole(Bench(), WAYS[way])
    actual = continued(Bench(overlap=overlap), expected, cut, WAYS[way])
    assert actual.end.reason == "length"
    if assert_same(expected, actual) == 0:
        for left, right in zip(expected.logprobs, actual.logprobs, strict=True):
            assert left.token_id == right.token_id
            assert left.logprob == pytest.approx(right.logprob, abs=1e-3)


def test_the_account_says_what_was_generated_and_what_the_prompt_cost():
    expected = whole(Bench(), GREEDY)
    usage = continued(Bench(), expected, 10, GREEDY).end.usage
    assert (usage.decoded, usage.prefilled, usage.cached) == (24, len(PROMPT), 0)


def test_a_stop_token_still_ends_it():
    free = whole(Bench(), GREEDY)
    stop = free.token_ids[12]
    params = replace(GREEDY, stop_token_ids=(stop,))
    expected = whole(Bench(), params)
    actual = continued(Bench(), expected, len(expected.token_ids) - 1, params)
    assert actual.end.reason == "stop"
    assert actual.token_ids == expected.token_ids


def test_a_fork_of_a_continued_call_shares_its_prompt():
    expected = whole(Bench(), GREEDY)
    bench = Bench()
    bench.calls["rest"] = Outcome()
    bench.send(SubmitCall("rest", "program", (*PROMPT, *expected.token_ids[:8]), GREEDY, 24, num_generated=8))
    for _ in range(3):
        bench.step()
    bench.submit("fork", PROMPT, GREEDY, max_tokens=24, fork_of="rest")
    bench.run()
    assert_same(expected, bench.calls["fork"])
    assert bench.calls["fork"].end.usage.prefilled < len(PROMPT)
    bench.assert_nothing_leaks()


@pytest.mark.parametrize(
    ("num_generated", "options"), [(3, {"max_tokens": 3}), (8, {}), (9, {}), (-1, {}), (2, {"open": True})]
)
def test_more_than_can_have_been_generated_is_refused(num_generated, options):
    bench = Bench()
    bench.calls["bad"] = Outcome()
    bench.send(SubmitCall("bad", "program", (1,) * 8, GREEDY, num_generated=num_generated, **options))
    assert bench.calls["bad"].end.error == "bad_max_tokens"
    bench.assert_nothing_leaks()


@lru_cache
def model():
    """The tokenizer of a real model, and random weights of the same vocabulary."""
    tokenizer = load_tokenizer(resolve("smollm2", cache_dir(), pull=True))
    shape = replace(SHAPES["tiny-llama"], vocab_size=tokenizer.vocab_size, max_context=512)
    return RandomCheckpoint(shape), tokenizer


def text_bench() -> Bench:
    return Bench(engine=build_engine(*model(), EngineConfig(dtype="float32", num_pages=256, page_size=4)))


def ending(**options) -> SamplingParams:
    return SamplingParams(seed=11, logprobs=2, stop_token_ids=model()[1].eos_token_ids, **options)


def texts(bench, outcome, cut, params, **options) -> tuple[str, str]:
    """What the undisturbed call says, and what its first part and the rest say together."""
    first = text_bench()
    first.submit("first", PROMPT, params, max_tokens=24, **options)
    while len(first.calls["first"].token_ids) < cut:
        first.step()
    actual = continued(bench, outcome, cut, params, **options)
    assert actual.token_ids == outcome.token_ids
    return outcome.text, first.calls["first"].text + actual.text


@pytest.mark.parametrize("cut", [1, 7, 15])
def test_no_text_is_lost_or_said_twice(cut):
    """Random tokens are full of halves of characters, which are held back."""
    params = ending(temperature=1.5)
    expected, actual = texts(text_bench(), whole(text_bench(), params), cut, params)
    assert actual == expected
    assert len(expected) > 20


def test_a_stop_string_that_had_begun_still_ends_it():
    params = ending(temperature=0.0)
    outcome = whole(text_bench(), params)
    tokenizer = model()[1]
    middle = [tokenizer.decode(outcome.token_ids[index : index + 1]) for index in range(10, 13)]
    params = replace(params, stop=("".join(middle),))
    stopped = whole(text_bench(), params)
    assert stopped.end.reason == "stop"
    for cut in range(len(stopped.token_ids) - 2, len(stopped.token_ids)):
        expected, actual = texts(text_bench(), stopped, cut, params)
        assert actual == expected


TOOL = ToolSpec("look", "Looks.", json.dumps({"type": "object", "properties": {"what": {"type": "integer"}}}))
CONSTRAINTS = {
    "schema": JSONSchema(
        json.dumps({"type": "array", "items": {"enum": ["a", "bc", 7]}, "minItems": 3, "maxItems": 9})
    ),
    "pattern": Regex("[ab]{4,9}(cd|[0-9]+)?"),
    "tool": ToolTurn((TOOL,), "required"),
}


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_a_grammar_goes_on_where_it_stood(kind):
    constraint, params = constraint_to_json(CONSTRAINTS[kind]), ending(temperature=1.0)
    outcome = whole(text_bench(), params, constraint=constraint)
    assert len(outcome.token_ids) >= 4
    for cut in range(1, len(outcome.token_ids), 3):
        expected, actual = texts(text_bench(), outcome, cut, params, constraint=constraint)
        assert actual == expected


def test_tokens_that_the_grammar_refuses_are_refused():
    bench = text_bench()
    bench.calls["bad"] = Outcome()
    constraint = constraint_to_json(CONSTRAINTS["pattern"])
    bench.send(SubmitCall("bad", "program", (*PROMPT, 0), ending(), 24, num_generated=1, constraint=constraint))
    assert bench.calls["bad"].end.error == "bad_constraint"
