"""Completions under a constraint: every one that ends satisfies it, and what cannot be one is refused."""

from __future__ import annotations

import json
import re
from typing import Literal

import pytest
from pydantic import BaseModel

from treadle.grammar import EBNF, Choice, JSONSchema, Regex
from treadle.runtime import Chunk, Completion, SamplingParams, local
from treadle.runtime.errors import InvalidRequestError

WILD = SamplingParams(temperature=1.5, seed=11)


class Move(BaseModel):
    side: Literal["left", "right"]
    steps: Literal[1, 2, 3]


SCHEMA = {"type": "array", "items": {"enum": ["warp", "weft"]}, "minItems": 2, "maxItems": 3}

CONSTRAINTS = {
    "schema": (SCHEMA, lambda text: set(json.loads(text)) <= {"warp", "weft"}),
    "model": (Move, Move.model_validate_json),
    "json schema": (JSONSchema(json.dumps(SCHEMA)), lambda text: len(json.loads(text)) in (2, 3)),
    "regex": (Regex(r"[0-9]{3}-[a-f]{2}"), re.compile(r"[0-9]{3}-[a-f]{2}").fullmatch),
    "choice": (Choice(("yes", "no")), {"yes", "no"}.__contains__),
    "ebnf": (EBNF('root ::= "a" | "(" root ")"'), lambda text: text.strip("()") == "a"),
}


@pytest.mark.parametrize(("constraint", "fits"), CONSTRAINTS.values(), ids=CONSTRAINTS)
async def test_what_ends_satisfies_its_constraint(fast_runtime, constraint, fits):
    async with fast_runtime() as runtime:
        many = await runtime.generate_many("Say it.", WILD, max_tokens=300, constraint=constraint, n=4)
        single = await runtime.generate("Say it.", WILD, max_tokens=300, constraint=constraint)
        parts = [part async for part in runtime.stream("Say it.", WILD, max_tokens=300, constraint=constraint)]
    *chunks, last = parts
    assert all(isinstance(chunk, Chunk) for chunk in chunks) and isinstance(last, Completion)
    for completion in (*many, single, last):
        assert completion.finish_reason == "stop" and fits(completion.text), completion.text
    assert single.text == many[0].text == last.text == "".join(chunk.text for chunk in chunks)


async def test_a_completion_that_is_cut_off_says_so(fast_runtime):
    async with fast_runtime() as runtime:
        completion = await runtime.generate("Say it.", WILD, max_tokens=2, constraint=Move)
    assert completion.finish_reason == "length" and '{"side":'.startswith(completion.text[:5])


@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        ({"type": "array", "uniqueItems": True}, "'uniqueItems' at /uniqueItems cannot be enforced"),
        ({"type": "no such type"}, "the schema is wrong at /type"),
        ({"type": object()}, "the schema cannot be written as JSON"),
        (Regex("("), "the pattern '\\('"),
        (Choice(()), "a choice needs at least one option"),
        (EBNF("no grammar"), "the grammar does not compile"),
        ("[0-9]+", "a constraint is a JSON Schema, a pydantic model, or Regex.*; this is a str"),
    ],
)
async def test_what_cannot_be_a_constraint_is_refused_and_the_next_call_works(fast_runtime, constraint, text):
    async with fast_runtime() as runtime:
        with pytest.raises(InvalidRequestError, match=text):
            await runtime.generate("Say it.", WILD, max_tokens=9, constraint=constraint)
        assert (await runtime.generate("Say it.", WILD, max_tokens=9, constraint=Choice(("yes",)))).text == "yes"


async def test_a_model_without_a_tokenizer_cannot_follow_one():
    async with local("random:tiny-llama") as runtime:
        with pytest.raises(InvalidRequestError, match="no tokenizer, so it cannot follow a constraint"):
            await runtime.generate([1, 2], max_tokens=4, constraint=Move)
