"""What the quality benchmark counts: known differences give known figures, and a broken bound is told."""

import pytest
import quality
import torch
from report import Report

from treadle.runtime.models import SHAPES, RandomCheckpoint


def logits(positions=50, vocab_size=200):
    return torch.randn(positions, vocab_size, generator=torch.Generator().manual_seed(0)) * 3


def figures(reference, found):
    targets = torch.arange(len(reference))
    exact, cost = quality.Cost(), quality.Cost()
    quality.add_in_parts(exact, reference, reference, targets)
    quality.add_in_parts(cost, reference, found, targets)
    return {name: value for name, value, _ in cost.figures(exact.perplexity)}


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_the_same_probabilities_cost_nothing(shift):
    found = figures(logits(), logits() + shift)
    assert found["top1_agreement"] == found["clear_top1_agreement"] == 100
    assert found["logit_error"] == pytest.approx(0, abs=1e-3)
    assert found["kl_divergence"] == pytest.approx(0, abs=1e-5)
    assert found["perplexity_ratio"] == pytest.approx(1, abs=1e-5)


def test_logits_that_are_larger_by_a_share_are_off_by_that_share():
    found = figures(logits(), logits() * 1.03)
    assert found["logit_error"] == pytest.approx(3, rel=1e-3)
    assert found["top1_agreement"] == 100


def test_divergence_and_perplexity_are_those_of_torch():
    reference, other = logits(300), logits(300).roll(1, 0) + logits(300)
    targets = torch.arange(300) % 200
    exact, cost = quality.Cost(), quality.Cost()
    quality.add_in_parts(exact, reference, reference, targets)
    quality.add_in_parts(cost, reference, other, targets)
    found = {name: value for name, value, _ in cost.figures(exact.perplexity)}
    divergence = torch.nn.functional.kl_div(
        other.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    perplexity = torch.nn.functional.cross_entropy(other, targets).exp()
    assert found["kl_divergence"] == pytest.approx(float(divergence), rel=1e-4)
    assert found["perplexity"] == pytest.approx(float(perplexity), rel=1e-4)


def test_only_clear_best_tokens_count_as_such():
    reference = torch.tensor([[1.0, 0.9, 0.0], [1.0, 0.5, 0.0]])
    found = figures(reference, torch.tensor([[0.9, 1.0, 0.0], [1.0, 0.5, 0.0]]))
    assert (found["top1_agreement"], found["clear_top1_agreement"]) == (50, 100)


@pytest.mark.parametrize(("bound", "holds"), [((quality.AT_MOST, 1e-9), False), ((quality.AT_MOST, 50.0), True)])
def test_a_broken_bound_is_told_in_words(bound, holds, monkeypatch):
    monkeypatch.setattr(quality, "BOUNDS", {"logit_error": bound})
    broken = quality.measure(RandomCheckpoint(SHAPES["tiny-llama"]), [torch.arange(32)], Report({}, as_json=True))
    assert bool(broken) != holds
    assert all("tokens at once: logit_error is" in text and "not at most 1e-09" in text for text in broken)
