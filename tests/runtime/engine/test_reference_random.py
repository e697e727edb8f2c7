"""Greedy generation equals `transformers` on random-weight models of every family."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from support.engines import Bench, checkpoint
from support.reference import Agreement, reference_model

from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.models import SHAPES, RandomCheckpoint
from treadle.runtime.models.config import RopeScaling

FAMILIES = {"tiny-llama": "Llama", "tiny-qwen2.5": "Qwen2", "tiny-qwen3": "Qwen3", "tiny-mistral": "Mistral"}


def generate_and_compare(bench: Bench, model, lengths: list[int], max_tokens: int) -> Agreement:
    rng = random.Random(0)
    prompts = {f"call {n}": [rng.randrange(500) for _ in range(n)] for n in lengths}
    for call_id, prompt in prompts.items():
        bench.submit(call_id, prompt, max_tokens=max_tokens)
    outcomes = bench.run()
    agreement = Agreement()
    for call_id, prompt in prompts.items():
        agreement.check(model, prompt, outcomes[call_id].token_ids)
    return agreement


@pytest.mark.parametrize("shape", FAMILIES)
def test_token_equal_with_transformers(shape):
    bench = Bench(shape, max_step_tokens=64)
    model = reference_model(checkpoint(shape), FAMILIES[shape])
    agreement = generate_and_compare(bench, model, [1, 2, 5, 16, 17, 63, 64, 200], 40)
    print(f"{shape}: {agreement.positions} positions, {agreement.ties} near ties")
    assert agreement.ties <= agreement.positions // 100


def test_sliding_window_equals_transformers():
    config = replace(SHAPES["tiny-mistral"], sliding_window=24)
    weights = RandomCheckpoint(config)
    engine = build_engine(weights, None, EngineConfig(dtype="float32", num_pages=256, page_size=4, max_step_tokens=32))
    agreement = generate_and_compare(Bench(engine=engine), reference_model(weights, "Mistral"), [3, 20, 30, 100], 40)
    assert agreement.ties <= agreement.positions // 100


def test_llama3_rope_scaling_equals_transformers():
    scaling = RopeScaling("llama3", factor=8.0, original_context=64, low_freq_factor=1.0, high_freq_factor=4.0)
    weights = RandomCheckpoint(replace(SHAPES["tiny-llama"], rope_scaling=scaling))
    engine = build_engine(weights, None, EngineConfig(dtype="float32", num_pages=256, page_size=4))
    agreement = generate_and_compare(Bench(engine=engine), reference_model(weights, "Llama"), [10, 100, 300], 40)
    assert agreement.ties <= agreement.positions // 100
