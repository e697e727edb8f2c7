"""A call's tokens do not depend on what else the engine does: batch, chunks, preemption, cache, forks, overlap."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.engines import GREEDY, Bench, assert_same, with_seed

from treadle.runtime.engine import sharing

SHAPES = ["tiny-llama", "tiny-qwen2.5", "tiny-qwen3", "tiny-mistral"]
SHARED = [(7 * i) % 300 for i in range(40)]

prompts = st.builds(
    lambda shared, own: SHARED[:shared] + own,
    st.integers(0, 40),
    st.lists(st.integers(0, 400), min_size=1, max_size=30),
)
sampled = st.builds(
    lambda seed, temperature, top_k, top_p, repetition: with_seed(
        seed, temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition, logprobs=2
    ),
    st.integers(0, 2**40),
    st.sampled_from([0.5, 1.0, 1.5]),
    st.sampled_from([0, 1, 20]),
    st.sampled_from([0.5, 1.0]),
    st.sampled_from([1.0, 1.3]),
)
workloads = st.lists(st.tuples(prompts, st.integers(1, 20), st.just(GREEDY) | sampled), min_size=1, max_size=8)

VARIANTS = {
    "batched": {},
    "chunked": {"max_step_tokens": 7},
    "preempted": {"num_pages": 28, "num_slots": 6, "retention": "lru", "admission": "greedy"},
    "small pool": {"num_pages": 28, "num_slots": 6},
    "small pool and a host tier": {"num_pages": 28, "num_slots": 6, "host_pages": 40, "max_step_moves": 3},
    "one slot": {"num_slots": 1},
    "prefix cache off": {"prefix_cache": False},
    "shared prefixes read by each row": {"cascade": False},
    "overlap": {"overlap": True},
    "overlap, chunked and preempted": {
        "overlap": True,
        "max_step_tokens": 9,
        "num_pages": 28,
        "num_slots": 6,
        "retention": "lru",
        "admission": "greedy",
    },
    "overlap, chunked and a host tier": {"overlap": True, "max_step_tokens": 9, "num_pages": 28, "host_pages": 40},
    "large pages": {"page_size": 16, "num_pages": 64},
    "requests in order": {"order": "fcfs", "num_pages": 40},
}
property_test = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def alone(shape, workload):
    """Every call by itself, on an engine that has seen nothing."""
    outcomes = []
    for prompt, max_tokens, params in workload:
        bench = Bench(shape)
        bench.submit("call", prompt, params, max_tokens=max_tokens)
        outcomes.append(bench.run()["call"])
    return outcomes


@pytest.mark.parametrize("variant", VARIANTS)
@given(workload=workloads, shape=st.sampled_from(SHAPES))
@property_test
def test_tokens_do_not_depend_on(variant, workload, shape):
    expected = alone(shape, workload)
    bench = Bench(shape, **VARIANTS[variant])
    for index, (prompt, max_tokens, params) in enumerate(workload):
        bench.submit(f"call {index}", prompt, params, max_tokens=max_tokens)
    outcomes = bench.run()
    for index, outcome in enumerate(expected):
        assert_same(outcome, outcomes[f"call {index}"])
    bench.assert_nothing_leaks()


@given(workload=workloads, overlap=st.booleans(), shape=st.sampled_from(SHAPES))
@property_test
def test_tokens_do_not_depend_on_reading_once_what_rows_share(workload, overlap, shape):
    expected = alone(shape, workload)
    with patch.object(sharing, "LEAST_SAVED", 1):
        bench = Bench(shape, overlap=overlap)
        for index, (prompt, max_tokens, params) in enumerate(workload):
            bench.submit(f"call {index}", SHARED + prompt, params, max_tokens=max_tokens)
            bench.submit(f"same {index}", prompt, params, max_tokens=max_tokens)
        outcomes = bench.run()
    for index, outcome in enumerate(expected):
        assert_same(outcome, outcomes[f"same {index}"])


@given(workload=workloads, count=st.integers(1, 4), overlap=st.booleans(), delay=st.integers(0, 6))
@property_test
def test_tokens_do_not_depend_on_forking(workload, count, overlap, delay):
    expected = alone("tiny-llama", workload)
    bench = Bench("tiny-llama", overlap=overlap)
    for index, (prompt, max_tokens, params) in enumerate(workload):
        bench.submit(f"call {index}", prompt, params, max_tokens=max_tokens)
    for _ in range(delay):
        bench.step()
    for index, (prompt, max_tokens, params) in enumerate(workload):
        parent = f"call {index}" if bench.calls[f"call {index}"].end is None else None
        for fork in range(count):
            bench.submit(f"fork {index}.{fork}", prompt, params, max_tokens=max_tokens, fork_of=parent)
    outcomes = bench.run()
    for index, outcome in enumerate(expected):
        assert_same(outcome, outcomes[f"call {index}"])
        for fork in range(count):
            assert_same(outcome, outcomes[f"fork {index}.{fork}"])
    bench.assert_nothing_leaks()


@given(workload=workloads, data=st.data(), overlap=st.booleans())
@property_test
def test_aborts_at_random_steps_leak_nothing_and_change_nobody(workload, data, overlap):
    from treadle.scheduler import AbortCall

    expected = alone("tiny-llama", workload)
    bench = Bench("tiny-llama", overlap=overlap, num_pages=40)
    for index, (prompt, max_tokens, params) in enumerate(workload):
        bench.submit(f"call {index}", prompt, params, max_tokens=max_tokens)
    victims = data.draw(st.sets(st.integers(0, len(workload) - 1)))
    moments = {victim: data.draw(st.integers(0, 25)) for victim in sorted(victims)}
    for moment in range(26):
        for victim in sorted(victims):
            if moments[victim] == moment:
                bench.send(AbortCall(f"call {victim}"))
        bench.step()
    outcomes = bench.run()
    for index, outcome in enumerate(expected):
        if index not in victims:
            assert_same(outcome, outcomes[f"call {index}"])
        elif outcomes[f"call {index}"].end.reason == "aborted":
            done = len(outcomes[f"call {index}"].token_ids)
            assert outcomes[f"call {index}"].token_ids == outcome.token_ids[:done]
    bench.assert_nothing_leaks()
