"""A bad call fails that call: with an error that says what to do, and with no effect on any other."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.engines import GREEDY, Bench, Outcome, assert_same

from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.errors import InvalidRequestError
from treadle.scheduler import AbortCall, AppendPrompt, EndProgram, OpenProgram, SubmitCall

POISON = 499
BAD_SAMPLING = {
    "temperature": [math.nan, math.inf, -1.0],
    "top_k": [-1],
    "top_p": [0.0, 1.5, math.nan],
    "min_p": [-0.1, math.inf],
    "repetition_penalty": [0.0, math.nan, -2.0],
    "presence_penalty": [math.inf, 1e9],
    "frequency_penalty": [math.nan],
    "logprobs": [-1, 10_000],
    "seed": [2**63],
    "stop": [("",), ("x",) * 1000],
    "logit_bias": [((100_000, 1.0),), ((-1, 1.0),), ((1, math.nan),), ((1, math.inf),)],
}


@pytest.fixture
def bench():
    return Bench()


def with_a_bystander(bench, act):
    """Runs `act` while another call runs, which must not notice."""
    fresh = Bench()
    fresh.submit("bystander", [1, 2, 3], max_tokens=12)
    expected = fresh.run()["bystander"]
    bench.submit("bystander", [1, 2, 3], max_tokens=12)
    for _ in range(3):
        bench.step()
    act()
    bench.run()
    assert_same(expected, bench.calls["bystander"])
    bench.assert_nothing_leaks()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD_SAMPLING for value in BAD_SAMPLING[name]])
def test_a_sampling_value_that_means_nothing_is_named(bench, name, value):
    with_a_bystander(bench, lambda: bench.submit("bad", [1], replace(GREEDY, **{name: value}), max_tokens=3))
    end = bench.calls["bad"].end
    assert (end.reason, end.error) == ("error", "bad_sampling")
    assert name in end.message


@pytest.mark.parametrize(
    ("prompt", "options", "code", "fix"),
    [
        ([1], {"max_tokens": 0}, "bad_max_tokens", "at least 1"),
        ([1], {"max_tokens": -5}, "bad_max_tokens", "at least 1"),
        ([1], {"max_tokens": 10**9}, "bad_max_tokens", "at most"),
        ([1] * 5000, {}, "prompt_too_long", "shorten it"),
        ([], {}, "empty_prompt", "at least one"),
        ([10**6], {}, "bad_token", "0 .."),
        ([-1], {}, "bad_token", "0 .."),
        ([1], {"fork_of": "nobody"}, "bad_fork", "without fork_of"),
    ],
)
def test_a_request_that_cannot_be_says_what_to_do(bench, prompt, options, code, fix):
    with_a_bystander(bench, lambda: bench.submit("bad", prompt, **options))
    assert bench.calls["bad"].end.error == code
    assert fix in bench.calls["bad"].end.message


def test_a_pool_too_small_for_the_prompt_is_named_as_the_cause():
    bench = Bench(num_pages=8, page_size=4)
    bench.submit("bad", [1] * 40)
    bench.submit("good", [1] * 20, max_tokens=4)
    bench.run()
    assert bench.calls["bad"].end.error == "prompt_too_long"
    assert "give it more pages" in bench.calls["bad"].end.message
    assert bench.calls["good"].end.reason == "length"


def test_a_call_that_fills_the_pool_ends_with_length():
    bench = Bench(num_pages=8, page_size=4)
    bench.submit("call", [1] * 20)
    assert bench.run()["call"].end.reason == "length"
    assert len(bench.calls["call"].token_ids) == 12


def test_commands_for_calls_and_programs_that_are_gone_are_rejected(bench):
    bench.submit("done", [1], max_tokens=1)
    bench.run()
    bench.send(AbortCall("done"), AbortCall("never"), AppendPrompt("done", (1,)), EndProgram("never"))
    assert [(r.subject, r.error) for r in bench.rejected] == [
        ("done", "unknown_call"),
        ("never", "unknown_call"),
        ("done", "unknown_call"),
        ("never", "unknown_program"),
    ]
    assert all("ended already" in r.message for r in bench.rejected)


def test_ids_in_use_are_refused_and_their_owners_go_on(bench):
    bench.submit("call", [1, 2], max_tokens=5)
    bench.send(SubmitCall("call", "program", (1,), GREEDY, 5), OpenProgram("program"))
    bench.send(SubmitCall("call", "program", (1,), replace(GREEDY, top_p=7.0), 5))
    bench.run()
    assert [r.error for r in bench.rejected] == ["duplicate_id", "duplicate_id", "bad_sampling"]
    assert len(bench.calls["call"].token_ids) == 5


def test_appending_too_much_ends_the_open_call(bench):
    def act():
        bench.submit("open", [1, 2], open=True)
        bench.send(AppendPrompt("open", (1,) * 5000))

    with_a_bystander(bench, act)
    assert bench.calls["open"].end.error == "prompt_too_long"


def test_appending_to_a_complete_call_is_rejected(bench):
    with_a_bystander(bench, lambda: bench.send(AppendPrompt("bystander", (1,))))
    assert bench.rejected[0].error == "not_open"


def test_more_calls_than_allowed_are_refused():
    bench = Bench()
    object.__setattr__(bench.scheduler.config, "max_calls", 2)
    for index in range(4):
        bench.submit(f"call {index}", [1], max_tokens=2)
    bench.run()
    assert [bench.calls[f"call {i}"].end.error for i in range(4)] == [None, None, "overloaded", "overloaded"]


def test_ending_a_program_aborts_its_calls_and_closes_its_account(bench):
    bench.send(OpenProgram("short"))
    bench.calls["a"], bench.calls["b"] = Outcome(), Outcome()
    bench.send(SubmitCall("a", "short", (1, 2, 3), GREEDY, 2))
    bench.run()
    bench.send(SubmitCall("b", "short", (1, 2, 3), GREEDY, 50))
    bench.step()
    bench.send(EndProgram("short"))
    bench.run()
    (ended,) = bench.ended
    assert bench.calls["b"].end.reason == "aborted"
    assert (ended.program_id, ended.calls, ended.usage.prefilled) == ("short", 2, 6)
    assert ended.usage.decoded == 2 + len(bench.calls["b"].token_ids)
    assert ended.usage.service_s > 0
    bench.assert_nothing_leaks()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_call_that_makes_the_step_raise_fails_alone(overlap):
    bench = Bench(overlap=overlap, max_step_tokens=64)
    decoder = bench.engine.runner.decoder
    forward = decoder.forward

    def explode_on_poison(token_ids, attention, wanted):
        if bool((token_ids == POISON).any()):
            raise RuntimeError("poison")
        return forward(token_ids, attention, wanted)

    decoder.forward = explode_on_poison
    for index in range(6):
        bench.submit(f"good {index}", [index, index + 1, index + 2], max_tokens=8)
    bench.submit("bad", [1, POISON, 2], max_tokens=8)
    bench.submit("later", [5, 6], max_tokens=8)
    bench.run()
    assert bench.calls["bad"].end.error == "engine"
    assert "RuntimeError: poison" in bench.calls["bad"].end.message
    fresh = Bench()
    for index in range(6):
        fresh.submit(f"good {index}", [index, index + 1, index + 2], max_tokens=8)
    fresh.run()
    for index in range(6):
        assert_same(fresh.calls[f"good {index}"], bench.calls[f"good {index}"])
    assert bench.calls["later"].end.reason == "length"
    bench.assert_nothing_leaks()


def limit_step(bench, most, fail):
    """From now on a step of more than `most` tokens fails. Returns the sizes of all steps that are tried."""
    runner, sizes = bench.engine.runner, []
    forward = runner.forward

    def within_memory(rows):
        sizes.append(sum(row.count for row in rows))
        if sizes[-1] > most:
            fail()
        return forward(rows)

    runner.forward = within_memory
    return sizes


def allocate_too_much():
    torch.empty(2**50)


def fail_like_a_device():
    raise torch.OutOfMemoryError("out of memory")


def fail_like_python():
    raise MemoryError


OUT_OF_MEMORY = [allocate_too_much, fail_like_a_device, fail_like_python]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("fail", OUT_OF_MEMORY)
def test_a_step_that_memory_cannot_hold_is_computed_in_parts(fail, overlap):
    def submit(bench):
        for index in range(7):
            bench.submit(f"call {index}", [index + 1, index + 2, index + 3], max_tokens=6)

    fresh, bench = Bench(), Bench(overlap=overlap)
    sizes = limit_step(bench, 4, fail)
    submit(fresh)
    submit(bench)
    fresh.run()
    bench.run()
    for call_id, expected in fresh.calls.items():
        assert bench.calls[call_id].end.reason == "length"
        assert_same(expected, bench.calls[call_id])
    # Six steps of seven rows, and one more with overlap: halving seven rows down to each alone takes 13 tries.
    assert len(sizes) <= 7 * 13
    bench.assert_nothing_leaks()


@pytest.mark.parametrize("fail", OUT_OF_MEMORY)
def test_a_prompt_that_memory_cannot_hold_says_what_would_help(fail):
    bench = Bench()
    limit_step(bench, 16, fail)
    bench.submit("bad", [1] * 17, max_tokens=4)
    bench.submit("good", [2] * 16, max_tokens=4)
    bench.run()
    assert bench.calls["bad"].end.error == "engine"
    assert bench.calls["bad"].end.message.endswith("; use a smaller max_step_tokens")
    assert bench.calls["good"].end.reason == "length"
    bench.assert_nothing_leaks()
    within = Bench(max_step_tokens=16)
    limit_step(within, 16, fail)
    within.submit("bad", [1] * 17, max_tokens=4)
    assert within.run()["bad"].end.reason == "length"


@pytest.mark.parametrize("option", ["num_pages", "page_size", "num_slots", "max_step_tokens", "max_context"])
def test_sizes_below_one_are_refused(option):
    with pytest.raises(InvalidRequestError, match=f"{option} is 0; it must be at least 1"):
        EngineConfig(**{option: 0})


@pytest.mark.parametrize("dtype", ["float16", "bf16", "", "torch.float32"])
def test_unknown_element_types_are_refused_with_the_choices(dtype):
    with pytest.raises(InvalidRequestError, match=f"dtype is '{dtype}'; choose one of auto, float32, bfloat16"):
        EngineConfig(dtype=dtype)


def test_unknown_weights_are_refused_with_the_choices():
    with pytest.raises(InvalidRequestError, match="weights is 'int3'; choose one of auto, full, int8, int4, int4-only"):
        EngineConfig(weights="int3")


@pytest.mark.parametrize("weights", ["int4", "int4-only"])
def test_weights_in_4_bits_are_refused_in_float32(weights):
    with pytest.raises(InvalidRequestError, match=f"weights is '{weights}': .* not for float32 on this cpu"):
        Bench(weights=weights)


def test_unknown_policies_are_refused_with_the_choices():
    with pytest.raises(InvalidRequestError, match="unknown order policy 'lifo'; choose one of atlas, continuum, fcfs"):
        Bench(order="lifo")


def test_a_pool_that_memory_cannot_hold_is_refused():
    with pytest.raises(InvalidRequestError, match="use fewer pages"):
        Bench(num_pages=10**12)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_id_used_again_does_not_get_the_tokens_of_the_call_before(overlap):
    """Under overlap a step of the old call may still be on its way when the new one begins."""
    fresh = Bench()
    fresh.submit("call", [7, 8, 9], max_tokens=6)
    expected = fresh.run()["call"]
    bench = Bench(overlap=overlap)
    bench.submit("call", [1, 2, 3], max_tokens=50)
    for _ in range(4):
        bench.step()
    bench.send(AbortCall("call"))
    bench.submit("call", [7, 8, 9], max_tokens=6)
    bench.run()
    assert_same(expected, bench.calls["call"])
    bench.assert_nothing_leaks()
