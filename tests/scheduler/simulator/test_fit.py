import random

import pytest

from treadle.scheduler.simulator.fit import MeasuredCall, Replay, Server, fit
from treadle.scheduler.simulator.hardware import StepCost

TRUTH = StepCost(fixed_s=5e-3, per_token_s=4e-5, per_pair_s=2e-9, per_context_token_s=5e-8)


def measured(server, num_calls=60):
    """A run as a server of the true costs would have logged it."""
    drawn, now, calls = random.Random(1), 0.0, []
    for _ in range(num_calls):
        now += drawn.expovariate(5.0)
        calls.append(MeasuredCall(drawn.randint(50, 1500), drawn.randint(2, 200), now, 0.0, 0.0))
    replayed = Replay(server, TRUTH).run(calls)
    return [
        MeasuredCall(
            one.call.prompt_tokens, one.call.output_tokens, one.call.queued_s, one.first_token_s, one.last_token_s
        )
        for one in replayed
    ]


def test_a_lone_call_takes_its_prompt_in_chunks_and_then_a_step_a_token():
    replay = Replay(Server(num_blocks=1000, step_tokens=100), TRUTH)
    (one,) = replay.run([MeasuredCall(250, 4, 2.0, 0.0, 0.0)])
    chunks = [TRUTH.seconds(100, 4950, 0), TRUTH.seconds(100, 14950, 0), TRUTH.seconds(50, 11225, 0)]
    assert one.first_token_s == pytest.approx(2.0 + sum(chunks))
    assert one.decode_work == (3, 3, 0, 250 + 251 + 252)


def test_a_full_pool_preempts_and_still_finishes():
    replay = Replay(Server(num_blocks=100), TRUTH)
    replayed = replay.run([MeasuredCall(700, 300, 0.0, 0.0, 0.0) for _ in range(4)])
    assert replay.num_preemptions > 0
    assert all(one.generated == 300 for one in replayed)
    assert replay.free == 100


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="10 blocks do not hold the largest call"):
        Replay(Server(num_blocks=10), TRUTH).run([MeasuredCall(170, 3, 0.0, 0.0, 0.0)])


@pytest.mark.parametrize("num_blocks", [300, 5000])
def test_the_costs_that_made_a_run_are_found_again(num_blocks):
    server = Server(num_blocks)
    guess = StepCost(8e-3, 6e-5, TRUTH.per_pair_s, TRUTH.per_context_token_s)
    found = fit(measured(server), server, guess)
    assert found.step.fixed_s == pytest.approx(TRUTH.fixed_s, rel=0.15)
    assert found.step.per_token_s == pytest.approx(TRUTH.per_token_s, rel=0.15)
    assert abs(found.makespan_error) < 0.05
    assert found.mean_absolute_decode_error < 0.1
