"""Greedy generation of the real model equals `transformers`, in float32 with the same dequantised weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.engines import GREEDY, Bench
from support.prompts import PROMPTS
from support.reference import Agreement, reference_model

from treadle.kernels.int4 import can_multiply_int4
from treadle.runtime.config import cache_dir
from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.engine.native import is_native
from treadle.runtime.models import open_checkpoint, resolve
from treadle.runtime.models.config import WEIGHTS
from treadle.runtime.text.chat_template import encode_chat
from treadle.runtime.text.tokenizer import load_tokenizer

MAX_TOKENS = 32
CAN_INT4 = can_multiply_int4(torch.device("cpu"), torch.bfloat16)
ANSWERS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "What is 2+2?": "The answer to this classic math problem is 4.",
}
"""The real model's, in float32 and in bfloat16, right or wrong."""


@pytest.fixture(scope="module")
def path():
    return resolve("smollm2", cache_dir(), pull=True)


@pytest.fixture(scope="module")
def tokenizer(path):
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def checkpoint(path):
    return open_checkpoint(path)


def test_token_equal_on_prompts_of_mixed_length_and_script(checkpoint, tokenizer):
    bench = Bench(engine=build_engine(checkpoint, tokenizer, EngineConfig(dtype="float32", num_pages=1024)))
    prompts = {f"call {i}": tokenizer.encode(text) for i, text in enumerate(PROMPTS)}
    assert len(prompts) >= 24
    assert max(map(len, prompts.values())) > 1000
    for call_id, prompt in prompts.items():
        bench.submit(call_id, prompt, max_tokens=MAX_TOKENS)
    outcomes = bench.run()
    model = reference_model(checkpoint, "Llama")
    agreement = Agreement()
    for call_id, prompt in prompts.items():
        agreement.check(model, prompt, outcomes[call_id].token_ids)
        assert outcomes[call_id].text == tokenizer.decode(outcomes[call_id].token_ids)
    print(f"{agreement.positions} positions, {agreement.ties} where the reference was nearly undecided")
    assert agreement.positions == 24 * MAX_TOKENS
    assert agreement.ties <= agreement.positions // 100


def ask(bench, tokenizer, call_id, question, max_tokens=40):
    """A greedy answer, with the two best logprobs of each position."""
    prompt = encode_chat(tokenizer, [{"role": "user", "content": question}])
    bench.submit(call_id, prompt, replace(GREEDY, stop_token_ids=tokenizer.eos_token_ids), max_tokens=max_tokens)
    return bench.run()[call_id]


BY_TORCH = [weights for weights in WEIGHTS if weights != "int8"] if CAN_INT4 else ["auto", "full"]
FORMS = [{"native": False, "weights": weights, "packed_weights": packed} for weights in BY_TORCH for packed in (0, 1)]
FORMS += [{"native": True, "weights": weights} for weights in WEIGHTS]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bfloat16_answers_like_float32(checkpoint, tokenizer, form):
    """Not token-equal, by design; but the best token of float32 is the best of bfloat16 nearly always."""
    config = EngineConfig(dtype="bfloat16", num_pages=512, **form)
    if form["native"] and not is_native(checkpoint.config, config):
        pytest.skip("native.c cannot be used here")
    engine = build_engine(checkpoint, tokenizer, config)
    assert engine.runner.decoder.dtype is torch.bfloat16
    bench = Bench(engine=engine)
    for question, answer in ANSWERS.items():
        outcome = ask(bench, tokenizer, question, question)
        assert (outcome.text, outcome.end.reason) == (answer, "stop")


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("before", ["Tell me a joke.", "What is 2+2?", "What is the capital of Germany?"])
def test_a_cached_prefix_does_not_change_the_answer_in_bfloat16(checkpoint, tokenizer, before, native):
    """With logits rounded to bfloat16 the first token was a tie, and a cached page turned it."""
    config = EngineConfig(dtype="bfloat16", native=native, num_pages=512)
    bench = Bench(engine=build_engine(checkpoint, tokenizer, config))
    ask(bench, tokenizer, "before", before, max_tokens=4)
    outcome = ask(bench, tokenizer, "call", "What is the capital of France?")
    assert outcome.end.usage.cached > 0
    assert outcome.text == "The capital of France is Paris."


@pytest.mark.parametrize("native", [False, True])
def test_the_two_best_tokens_never_tie_in_bfloat16(checkpoint, tokenizer, native):
    config = EngineConfig(dtype="bfloat16", native=native, num_pages=1024)
    bench = Bench(engine=build_engine(checkpoint, tokenizer, config))
    for index, text in enumerate(PROMPTS):
        bench.submit(f"call {index}", tokenizer.encode(text), max_tokens=MAX_TOKENS)
    outcomes = bench.run().values()
    gaps = [outcome.gap(index) for outcome in outcomes for index in range(len(outcome.token_ids))]
    assert len(gaps) == len(PROMPTS) * MAX_TOKENS
    assert min(gaps) > 0
