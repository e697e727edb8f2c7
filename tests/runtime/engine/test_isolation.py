"""Numbers that are not finite stay with the call that computed them, whoever has its slot and its pages afterwards."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from support.engines import GREEDY, Bench, assert_same

from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.models import SHAPES, RandomCheckpoint
from treadle.scheduler import AbortCall

POISON = 499
BYSTANDERS = {"short": list(range(10, 19)), "long": list(range(30, 43))}
"""Prompts of three and of four pages: they decode in one batch, where the short one is padded."""


class _PoisonedCheckpoint(RandomCheckpoint):
    """One token's embedding is not a number."""

    def tensor(self, name):
        tensor = super().tensor(name)
        if name == "model.embed_tokens.weight":
            tensor = tensor.clone()
            tensor[POISON] = math.nan
        return tensor


@pytest.fixture(params=[False, True], ids=["no overlap", "overlap"])
def poisoned(request):
    """Makes a bench whose model is poisoned. Small pools: bystanders use every page."""

    def make(**config):
        settings = {"dtype": "float32", "num_pages": 14, "page_size": 4, "overlap": request.param, **config}
        model = _PoisonedCheckpoint(replace(SHAPES["tiny-llama"], tied_embeddings=False))
        return Bench(engine=build_engine(model, None, EngineConfig(**settings)))

    return make


def submit_bystanders(bench):
    for name, prompt in BYSTANDERS.items():
        bench.submit(name, prompt, max_tokens=14)


def assert_bystanders_unharmed(bench, fresh):
    submit_bystanders(fresh)
    fresh.run()
    for name in BYSTANDERS:
        assert bench.calls[name].end.reason == "length", bench.calls[name].end.message
        assert_same(fresh.calls[name], bench.calls[name])
    bench.assert_nothing_leaks()


def test_memory_that_nobody_has_written_may_hold_anything(poisoned):
    bench = poisoned()
    bench.engine.runner.state.kv.fill_(math.nan)
    submit_bystanders(bench)
    bench.run()
    assert_bystanders_unharmed(bench, poisoned())


def test_a_call_whose_logits_are_not_finite_fails_and_its_pages_serve_others(poisoned):
    bench = poisoned()
    bench.submit("bad", [1, 2, 3, POISON] * 12, max_tokens=5)
    bench.run()
    assert bench.calls["bad"].end.error == "engine"
    assert "not finite" in bench.calls["bad"].end.message
    submit_bystanders(bench)
    bench.run()
    assert_bystanders_unharmed(bench, poisoned())


def test_pages_of_a_call_that_was_aborted_serve_others(poisoned):
    """It is aborted before it would sample; without overlap it has failed by then."""
    bench = poisoned(max_step_tokens=16)
    bench.submit("bad", [POISON] * 48)
    bench.step()
    bench.send(AbortCall("bad"))
    submit_bystanders(bench)
    bench.run()
    assert_bystanders_unharmed(bench, poisoned())


def test_pages_of_calls_that_stopped_serve_others(poisoned):
    """Under overlap a stop token is being computed when it is found to be one."""
    bench = poisoned()
    stops_at_once = replace(GREEDY, logit_bias=((POISON, 1000.0),), stop_token_ids=(POISON,))
    for index in range(4):
        bench.submit(f"stops {index}", [100 + index] * 11, stops_at_once)
    bench.run()
    assert all(bench.calls[f"stops {index}"].end.reason == "stop" for index in range(4))
    submit_bystanders(bench)
    bench.run()
    assert_bystanders_unharmed(bench, poisoned())


def test_a_slot_serves_others_before_the_bad_result_is_there(poisoned):
    bench = poisoned(num_slots=1)
    bench.submit("bad", [1, 2, POISON, 3] * 2, max_tokens=5)
    bench.step()
    bench.send(AbortCall("bad"))
    submit_bystanders(bench)
    bench.run()
    assert_bystanders_unharmed(bench, poisoned())


def test_a_bad_prompt_is_computed_beside_others(poisoned):
    bench = poisoned(max_step_tokens=32, num_pages=32)
    bench.submit("bad", [1, 2, 3, POISON] * 18, max_tokens=5)
    submit_bystanders(bench)
    bench.run()
    assert bench.calls["bad"].end.error == "engine"
    assert_bystanders_unharmed(bench, poisoned())


def test_the_good_beginning_of_a_bad_prompt_is_not_shared_spoiled(poisoned):
    """Attention may spread what is not finite to earlier tokens of the same chunk, and so to a page of good ones."""
    bench = poisoned(max_step_tokens=16, num_pages=32)
    bench.submit("bad", BYSTANDERS["short"][:8] + [POISON] * 16, max_tokens=5)
    bench.run()
    assert bench.calls["bad"].end.error == "engine"
    submit_bystanders(bench)
    bench.run()
    assert_bystanders_unharmed(bench, poisoned())
