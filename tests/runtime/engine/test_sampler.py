"""Sampling draws from the distribution that its parameters describe, and depends on nothing else."""

from __future__ import annotations

import pytest
import torch

from treadle.kernels import sampling as ops
from treadle.runtime.engine.device import CPU
from treadle.runtime.engine.sampler import SampleRow, sample
from treadle.scheduler import SamplingParams

VOCAB = 20


def draw(logits, params, count, first_position=0):
    """`count` tokens for the same logits at as many positions."""
    rows = [SampleRow(params, first_position + i, 0, lambda: torch.empty(0, dtype=torch.long)) for i in range(count)]
    return sample(logits.repeat(count, 1), rows, CPU()).tokens


def frequencies(tokens):
    return torch.bincount(tokens, minlength=VOCAB) / len(tokens)


@pytest.fixture
def logits():
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_softmax(logits, temperature):
    count = 40_000
    found = frequencies(draw(logits, SamplingParams(temperature=temperature, seed=3), count))
    expected = (logits / temperature).softmax(-1)
    chi_square = float((count * (found - expected) ** 2 / expected).sum())
    assert chi_square < 43.8, "the 99.9 % quantile for 19 degrees of freedom"


def test_neighbouring_seeds_and_positions_are_independent(logits):
    same = [
        float(
            (draw(logits, SamplingParams(seed=a), 5000) == draw(logits, SamplingParams(seed=b), 5000, p)).float().mean()
        )
        for a, b, p in ((1, 2, 0), (1, 1, 1), (1, 1, 5000), (0, 2**32, 0), (7, -7, 0))
    ]
    expected = float(logits.softmax(-1).square().sum())
    assert same == pytest.approx([expected] * 5, abs=0.03)


def test_a_seed_means_the_same_in_any_batch(logits):
    params = SamplingParams(seed=5)
    other = SamplingParams(seed=9, top_k=3, temperature=0.7)
    alone = draw(logits, params, 1, first_position=42)
    rows = [SampleRow(p, 42, 0, lambda: torch.empty(0, dtype=torch.long)) for p in (other, params, other)]
    assert sample(logits.repeat(3, 1), rows, CPU()).tokens[1] == alone[0]


def test_temperature_zero_is_the_best_token(logits):
    assert set(draw(logits, SamplingParams(temperature=0.0), 50).tolist()) == {int(logits.argmax())}
    assert set(draw(logits, SamplingParams(temperature=1e-30), 50).tolist()) == {int(logits.argmax())}


def test_top_k_keeps_the_k_best(logits):
    found = set(draw(logits, SamplingParams(temperature=3.0, top_k=4), 3000).tolist())
    assert found == set(logits.topk(4).indices.tolist())


def test_top_k_larger_than_the_vocabulary_keeps_all(logits):
    assert torch.equal(
        draw(logits, SamplingParams(top_k=10**6, seed=1), 200), draw(logits, SamplingParams(seed=1), 200)
    )


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
    kept = lambda p: ops.keep_top_p(logits[None], torch.tensor([p])).isfinite()[0].tolist()  # noqa: E731
    assert kept(0.4) == [True, False, False, False, False]
    assert kept(0.6) == [True, True, False, False, False]
    assert kept(0.8) == [True, True, True, False, False]
    assert kept(1e-9) == [True, False, False, False, False]
    assert kept(0.9999) == [True] * 5


def test_min_p_is_relative_to_the_best():
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
    kept = ops.keep_min_p(logits.repeat(2, 1), torch.tensor([0.25, 0.0])).isfinite().tolist()
    assert kept == [[True, True, True, False, False], [True] * 5]


def test_penalties():
    logits = torch.tensor([2.0, -2.0, 1.0, 1.0, 1.0])
    ops.penalize(logits, torch.tensor([0, 1, 2, 2]), num_prompt=2, repetition=2.0, presence=0.5, frequency=0.25)
    assert logits.tolist() == [1.0, -4.0, 0.5 - 0.5 - 2 * 0.25, 1.0, 1.0]


def test_presence_and_frequency_do_not_count_the_prompt():
    logits = torch.zeros(3)
    ops.penalize(logits, torch.tensor([0, 1]), num_prompt=2, repetition=1.0, presence=1.0, frequency=1.0)
    assert logits.tolist() == [0.0, 0.0, 0.0]


def test_logit_bias_forces_and_forbids(logits):
    forced = SamplingParams(logit_bias=((7, 1000.0),))
    assert set(draw(logits, forced, 100).tolist()) == {7}
    forbidden = SamplingParams(temperature=0.0, logit_bias=((int(logits.argmax()), -1000.0),))
    assert set(draw(logits, forbidden, 5).tolist()) == {int(logits.topk(2).indices[1])}


def test_logprobs_are_of_the_model_before_any_change(logits):
    params = SamplingParams(temperature=0.1, top_k=1, logit_bias=((3, 5.0),), logprobs=3)
    rows = [SampleRow(params, 0, 0, lambda: torch.empty(0, dtype=torch.long))]
    every, values, ids = sample(logits[None].clone(), rows, CPU()).logprobs[0]
    torch.testing.assert_close(every, logits.log_softmax(-1))
    torch.testing.assert_close(values, logits.log_softmax(-1).topk(3).values)
    assert ids.tolist() == logits.topk(3).indices.tolist()


def test_a_row_that_is_not_finite_is_marked_and_the_others_are_not(logits):
    bad = logits.clone()
    bad[4] = torch.nan
    for temperature in (0.0, 1.0):
        rows = [SampleRow(SamplingParams(temperature), 0, 0, lambda: torch.empty(0, dtype=torch.long))] * 2
        tokens = sample(torch.stack((bad, logits)), rows, CPU()).tokens.tolist()
        assert tokens[0] == -1
        assert tokens[1] >= 0


def test_noise_is_always_finite():
    """An infinite value would choose a token that a grammar forbids: minus infinity plus infinity is no number."""
    for seed in range(12):
        noise = ops.gumbel_noise(torch.full((128,), seed), torch.arange(128), 49152)
        assert bool(noise.isfinite().all())
    assert float(noise.max()) < 17.0
