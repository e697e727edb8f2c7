"""An engine whose layers are one operation: the same tokens whatever it does beside, and nearly those of torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from support.engines import GREEDY, Bench, checkpoint

from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.engine.native import find_native
from treadle.runtime.engine.native_attention import MOST_ROWS, MOST_TOKENS, rows_of_task, work
from treadle.runtime.engine.sharing import SharedPrefix
from treadle.runtime.models.weights import WeightReader
from treadle.scheduler import Row

from .test_invariance import VARIANTS, property_test, workloads

SHAPE = "tiny-qwen3"
"""Whose heads have 32 dimensions. Those of the other tiny shapes have 16, which no tile holds."""
CONFIG = EngineConfig(dtype="bfloat16")
NATIVE = find_native(checkpoint(SHAPE).config, CONFIG)
needs_native = pytest.mark.skipif(NATIVE is None, reason="native.c cannot be used here")


def tokens_of(workload, **config):
    bench = Bench(SHAPE, dtype="bfloat16", **config)
    for index, (prompt, max_tokens, sampling) in enumerate(workload):
        bench.submit(f"call {index}", prompt, sampling, max_tokens=max_tokens)
    return {call_id: (outcome.token_ids, outcome.logprobs) for call_id, outcome in bench.run().items()}


@needs_native
@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_and_logprobs_are_the_same_to_the_last_bit(name):
    """In bfloat16, with one form of weights: sums have one order whatever is computed together."""

    @property_test
    @given(workloads)
    def check(workload):
        alone = {}
        for index, call in enumerate(workload):
            alone[f"call {index}"] = tokens_of([call], num_pages=256)["call 0"]
        assert tokens_of(workload, **VARIANTS[name]) == alone

    check()


@needs_native
@pytest.mark.parametrize("weights", ["full", "int8", "int4"])
def test_logprobs_are_nearly_those_of_torch(weights):
    prompt = [(7 * i) % 400 for i in range(90)]
    both = []
    for native in (True, False):
        torch_weights = weights if native or weights != "int8" else "full"
        bench = Bench(SHAPE, dtype="bfloat16", native=native, weights=torch_weights)
        bench.submit("call", prompt, GREEDY, max_tokens=1)
        both.append(dict(bench.run()["call"].logprobs[0].top))
    ours, theirs = both
    shared = ours.keys() & theirs.keys()
    assert shared and all(abs(ours[token] - theirs[token]) < 0.05 for token in shared)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [("tiny-llama", {}), (SHAPE, {"native": False}), (SHAPE, {"dtype": "float32"})],
    ids=["heads of 16", "switched off", "float32"],
)
def test_torch_computes_what_it_is_not_for(shape, settings):
    assert find_native(checkpoint(shape).config, EngineConfig(**{"dtype": "bfloat16", **settings})) is None


@pytest.mark.usefixtures("monkeypatch")
def test_torch_computes_where_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path))
    monkeypatch.setattr("treadle.runtime.engine.native.c_compiler", lambda: None)
    assert find_native(checkpoint(SHAPE).config, CONFIG) is None


@needs_native
def test_what_is_stored_in_two_ways_is_in_8_bits_on_request():
    class Mixed:
        """Queries in 4 bits, keys in 8, values in neither."""

        config, tensor = checkpoint(SHAPE).config, checkpoint(SHAPE).tensor

        def codes(self, name):
            from treadle.kernels.codes import quantize_int4, quantize_int8

            forms = {"q_proj": quantize_int4, "k_proj": quantize_int8}
            return next((form(self.tensor(name)) for part, form in forms.items() if part in name), None)

    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    x = torch.randn(4, Mixed.config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.float() @ torch.cat([Mixed.tensor(f"{name}.weight").float() for name in names]).T
    for weights, bound in (("auto", 2**-7), ("int8", 2**-6), ("int4", 0.15)):
        reader = WeightReader(Mixed(), torch.bfloat16, torch.device("cpu"), weights, packed=True, native=NATIVE)
        out = reader.projection(*names, bias=False)(x)
        assert float((out - exact).norm() / exact.norm()) < (bound if weights != "int8" else 0.15)


def rows(*spans):
    return [Row(f"call {slot}", slot, start, count, sample=True) for slot, (start, count) in enumerate(spans)]


class TestWork:
    def test_a_row_with_one_token_is_a_task_and_the_longest_is_first(self):
        runs, tasks = work(rows((5, 1), (90, 1), (0, 3)), [], 16, 2)
        assert runs == [(0, 1, 0, 5), (1, 1, 1, 90), (2, 3, 2, 0)]
        assert tasks == [(1, 1, 0), (2, 1, 0), (0, 1, 0)]

    def test_a_prompt_is_cut_into_pieces(self):
        runs, tasks = work(rows((10, 2 * MOST_TOKENS + 5)), [], 16, 2)
        assert runs == [
            (i * MOST_TOKENS, count, 0, 10 + i * MOST_TOKENS) for i, count in enumerate((MOST_TOKENS, MOST_TOKENS, 5))
        ]
        assert sorted(tasks) == [(0, 1, 0), (1, 1, 0), (2, 1, 0)]

    def test_rows_that_share_are_tasks_together_up_to_whole_spans(self):
        many = rows(*[(200 + i, 1) for i in range(5)], (7, 1))
        runs, tasks = work(many, [SharedPrefix(tuple(range(5)), num_pages=9)], 16, 2)
        assert len(runs) == 6
        assert sorted(tasks) == [(0, 3, 128), (3, 2, 128), (5, 1, 0)]

    @pytest.mark.parametrize(("num_rows", "num_threads", "expected"), [(8, 1, 8), (8, 2, 4), (3, 8, 3), (6, 8, 2)])
    def test_a_small_group_gives_each_thread_a_task_of_two_rows_or_more(self, num_rows, num_threads, expected):
        assert rows_of_task(num_rows, num_threads) == expected

    @pytest.mark.parametrize("num_rows", range(2, 100))
    def test_no_task_has_too_many_rows(self, num_rows):
        assert rows_of_task(num_rows, 4) <= MOST_ROWS
