import math

import pytest

from treadle.scheduler.simulator.clock import Outcome, ProgramRecord
from treadle.scheduler.simulator.report import Origin, Point, paired_ratio, percentile, summarise

ORIGIN = Origin(
    "p", "a+b+c", 0, Point(1000, programs=2), 3, "trace", "all", None, "recorded", "engine", "digest", deadline=2.0
)


def outcome(**counts):
    """Two programs that take 10 s and 40 s, and would take 10 s alone."""
    records = [
        ProgramRecord("quick", 0.0, 10.0, 10.0, [0.5, 1.5]),
        ProgramRecord("slow", 5.0, 45.0, 10.0, [2.5]),
    ]
    made = {"seconds": 45.0, "busy_s": 9.0, "wall_s": 0.5, "plan_s": 0.1, "steps": 100, "plans": 10, "prompt": 1000}
    return Outcome(programs=records, **(made | counts))


def test_times_are_those_of_whole_programs():
    result = summarise(outcome(), 7.0, ORIGIN)
    assert (result.completion_mean_s, result.completion_p50_s, result.excess_mean_s) == (25.0, 25.0, 15.0)
    assert (result.slowdown_mean, result.slowdown_max, result.fluid_mean_s) == (2.5, 4.0, 7.0)
    assert (result.ttft_p50_s, result.goodput, result.busy) == (1.5, 0.5, 0.2)
    assert result.fairness == pytest.approx((1 + 0.25) ** 2 / (2 * (1 + 0.0625)))
    assert (result.total, result.left_out, result.programs_per_hour) == (2, 3, 160.0)


def test_tokens_computed_again_are_those_that_were_neither_new_nor_cached():
    result = summarise(outcome(cached=600, new=300, re_prefilled=50), 0.0, ORIGIN)
    assert (result.re_prefilled_tokens, result.prefilled, result.hit_rate) == (150, 450, 0.6)


def test_what_another_program_computed_is_not_computed_again():
    assert summarise(outcome(cached=900, new=300), 0.0, ORIGIN).re_prefilled_tokens == 0


def test_scheduler_time_is_told_for_a_step_and_for_a_plan():
    result = summarise(outcome(), 0.0, ORIGIN)
    assert (result.scheduler_us_per_step, result.scheduler_us_per_plan) == pytest.approx((1000, 10000))
    assert result.simulated_seconds_per_wall_second == 90.0


@pytest.mark.parametrize(("share", "value"), [(0.0, 1.0), (0.5, 2.5), (1.0, 4.0), (0.95, 3.85)])
def test_percentiles_are_linear_between_values(share, value):
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == pytest.approx(value)


def test_a_ratio_of_pairs_has_an_interval_unless_there_is_one_pair():
    assert paired_ratio([20.0], [10.0]) == paired_ratio([4.0], [2.0])
    assert paired_ratio([20.0], [10.0]).low is None
    ratio = paired_ratio([10.0, 40.0, 20.0], [10.0, 10.0, 10.0])
    reach = 4.303 * math.log(2) / math.sqrt(3)
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((2.0, 2 * math.exp(-reach), 2 * math.exp(reach)))


def test_equal_pairs_leave_no_doubt():
    ratio = paired_ratio([3.0, 5.0], [3.0, 5.0])
    assert (ratio.mean, ratio.low, ratio.high) == (1.0, 1.0, 1.0)
