"""The engine with its GPU kernels generates what it does with plain torch."""

import pytest
import torch
from support.engines import GREEDY, Bench, assert_same, checkpoint, with_seed

from treadle.kernels.gpu import TRITON
from treadle.runtime.engine import build, sharing
from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.engine.device import CPU
from treadle.runtime.engine.graphs import DecodeStep
from treadle.runtime.engine.layout import lay_out
from treadle.runtime.engine.paged import PagedAttention
from treadle.scheduler import Row

LONG = [(7 * i) % 300 for i in range(37)]
PROMPTS = {"long": LONG, "short": [5, 6, 7], "like long": LONG[:30]}
PARAMS = {"long": GREEDY, "short": with_seed(3, temperature=0.8, top_k=20, logprobs=2), "like long": GREEDY}


def bench_with(ops, monkeypatch, shape="tiny-llama", **config):
    monkeypatch.setattr(build, "open_device", lambda name, native: CPU(ops))
    settings = EngineConfig(dtype="float32", **{"num_pages": 64, "page_size": 16, "max_step_tokens": 32, **config})
    return Bench(engine=build_engine(checkpoint(shape), None, settings))


def generate(bench):
    for name, prompt in PROMPTS.items():
        bench.submit(name, prompt, PARAMS[name], max_tokens=3)
    return bench.run()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen3"])
def test_tokens_are_the_same(monkeypatch, shape, overlap):
    expected = generate(Bench(shape))
    bench = bench_with(TRITON, monkeypatch, shape, overlap=overlap)
    outcomes = generate(bench)
    for name in PROMPTS:
        assert_same(expected[name], outcomes[name])
    bench.assert_nothing_leaks()


def test_rows_that_share_a_prefix_read_it_once(monkeypatch):
    monkeypatch.setattr(sharing, "LEAST_SAVED", 1)
    one, two = bench_with(TRITON, monkeypatch), Bench()
    for bench in (one, two):
        bench.submit("first", LONG, max_tokens=1)
        bench.run()
        bench.submit("alone", [9, 8, 7], max_tokens=3)
        for index in range(3):
            bench.submit(f"branch {index}", [*LONG, index], max_tokens=3)
        bench.run()
    for name, outcome in two.calls.items():
        assert_same(outcome, one.calls[name])


def test_pages_move_between_the_tiers(monkeypatch):
    bench = bench_with(TRITON, monkeypatch, num_pages=4, host_pages=8, retention="lru", admission="greedy")
    fresh = Bench(page_size=16)
    prompts = {"first": LONG, "other": [9] * 40, "first again": LONG}
    for name, prompt in prompts.items():
        for one in (bench, fresh):
            one.submit(name, prompt, max_tokens=2)
            one.run()
    assert bench.scheduler.memory.num_loaded > 0
    for name in prompts:
        assert_same(fresh.calls[name], bench.calls[name])


def test_rows_that_are_padding_change_nothing(monkeypatch):
    bench = bench_with(TRITON, monkeypatch)
    bench.engine.runner.state.kv.zero_()
    bench.submit("call", LONG, max_tokens=2)
    bench.step()
    bench.step()
    runner = bench.engine.runner
    row = Row("call", 0, len(LONG), 1, True)
    before = runner.state.kv.clone()
    with torch.inference_mode():
        layout = lay_out([row], runner.state, runner.device)
        attention = PagedAttention(runner.state, TRITON.paged, layout, None)
        expected = runner.decoder.forward(layout.token_ids, attention, layout.sampling)
        runner.state.kv.copy_(before)
        step = DecodeStep(runner.decoder, runner.state, TRITON.paged, 4)
        step.inputs[:, 1] = torch.tensor([row.slot, row.start])
        logits, finite = step.compute()
    torch.testing.assert_close(logits[1], expected[0], rtol=1e-4, atol=1e-4)
    assert bool(finite[1])
    changed = (runner.state.kv != before).any(-1).any(-1).any(0).any(0).nonzero()
    assert len(changed) <= 1, "only the row's own token was written"
