"""Costs are found again in the times that they make."""

import pytest
from live.calibration import Sample, Work, fit

from treadle.scheduler.simulator import StepCost

WORKS = [
    Work(new_tokens, num_pairs, context, 1)
    for new_tokens in (1, 16, 256)
    for num_pairs in (0, 1000, 50_000)
    for context in (0, 500, 20_000)
]


def samples(step):
    return [Sample(work, step.seconds(work.new_tokens, work.pairs, work.context)) for work in WORKS]


def test_times_on_a_line_give_its_costs():
    step = StepCost(5e-3, 2e-5, 3e-8, 4e-7)
    found = fit(samples(step))
    for name in ("fixed_s", "per_token_s", "per_pair_s", "per_context_token_s"):
        assert getattr(found.step, name) == pytest.approx(getattr(step, name))
    assert found.largest_error < 1e-9


def test_a_cost_that_would_be_below_zero_is_left_out():
    bent = [Sample(work, 5e-3 + 1e-5 * work.new_tokens - 1e-9 * work.pairs + 1e-7 * work.context) for work in WORKS]
    found = fit(bent)
    assert found.step.per_pair_s == 0
    assert found.step.fixed_s == pytest.approx(5e-3, rel=0.05)
