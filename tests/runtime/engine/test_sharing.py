"""What is computed only once: shared prefixes, forks, and the known part of an open call. Asserted on token counts."""

from __future__ import annotations

import pytest
from support.engines import GREEDY, Bench, assert_same

from treadle.scheduler import AppendPrompt, OpenProgram, SubmitCall

PAGE = 16
PROMPT = [(11 * i) % 400 for i in range(50)]
LONG_PROMPT = [(11 * i) % 400 for i in range(100)]


@pytest.fixture
def bench():
    return Bench(page_size=PAGE, num_pages=64)


def usage(bench, call_id):
    return bench.calls[call_id].end.usage


def test_a_second_call_finds_the_full_pages_of_a_shared_prefix(bench):
    bench.submit("first", [*PROMPT, 1, 2], max_tokens=4)
    bench.run()
    bench.submit("second", [*PROMPT, 3, 4, 5], max_tokens=4)
    bench.run()
    assert usage(bench, "first").cached == 0
    assert usage(bench, "first").prefilled == 52
    assert usage(bench, "second").cached == len(PROMPT) // PAGE * PAGE == 48
    assert usage(bench, "second").prefilled == 53 - 48


def test_the_last_prompt_token_is_never_taken_from_the_cache(bench):
    prompt = PROMPT[:48]
    bench.submit("first", prompt, max_tokens=2)
    bench.run()
    bench.submit("again", prompt, max_tokens=2)
    bench.run()
    assert usage(bench, "again").cached == 32
    assert_same(bench.calls["first"], bench.calls["again"])


def test_generated_tokens_are_shared_with_the_next_turn(bench):
    bench.submit("turn", PROMPT, max_tokens=20)
    answer = bench.run()["turn"].token_ids
    bench.submit("next turn", [*PROMPT, *answer, 7, 8], max_tokens=2)
    bench.run()
    # The KV of the last generated token is never computed, so 69 tokens had pages, 64 of them full ones.
    assert usage(bench, "next turn").cached == 64


def test_the_next_turn_takes_over_the_unfinished_page(bench):
    bench.submit("turn", PROMPT, max_tokens=20)
    answer = bench.run()["turn"].token_ids
    bench.submit("next turn", [*PROMPT, *answer, 7, 8], max_tokens=2, extends="turn")
    bench.run()
    assert usage(bench, "next turn").cached == 69
    assert usage(bench, "next turn").prefilled == 3, "the last generated token and the two new ones"
    fresh = Bench(page_size=PAGE, num_pages=64)
    fresh.submit("alone", [*PROMPT, *answer, 7, 8], max_tokens=2)
    assert_same(fresh.run()["alone"], bench.calls["next turn"])


def test_a_turn_that_does_not_extend_what_it_says_is_computed_rightly(bench):
    bench.submit("turn", PROMPT, max_tokens=20)
    bench.run()
    bench.submit("other", [*PROMPT[:48], 399, 398, 397, 396], max_tokens=5, extends="turn")
    bench.run()
    fresh = Bench(page_size=PAGE, num_pages=64)
    fresh.submit("alone", [*PROMPT[:48], 399, 398, 397, 396], max_tokens=5)
    assert_same(fresh.run()["alone"], bench.calls["other"])
    bench.assert_nothing_leaks()


def test_tenants_share_nothing(bench):
    bench.send(OpenProgram("other", tenant="other"))
    bench.submit("ours", PROMPT, max_tokens=2)
    bench.run()
    bench.calls["theirs"] = type(bench.calls["ours"])()
    bench.send(SubmitCall("theirs", "other", tuple(PROMPT), GREEDY, 2))
    bench.run()
    assert usage(bench, "theirs").cached == 0


def test_the_cache_can_be_switched_off():
    bench = Bench(page_size=PAGE, num_pages=64, prefix_cache=False)
    bench.submit("first", PROMPT, max_tokens=2)
    bench.run()
    bench.submit("second", PROMPT, max_tokens=2)
    bench.run()
    assert usage(bench, "second").cached == 0


def test_an_open_call_is_prefilled_before_its_prompt_is_complete(bench):
    bench.submit("call", LONG_PROMPT, max_tokens=4, open=True)
    bench.run()
    assert bench.calls["call"].token_ids == []
    steps = bench.scheduler._num_steps
    assert steps > 0
    bench.run()
    assert bench.scheduler._num_steps == steps, "an open call with nothing to compute costs no steps"


def test_an_open_call_is_computed_some_pages_at_once(bench):
    bench.submit("call", (), max_tokens=4, open=True)
    steps = []
    for token_id in LONG_PROMPT:
        bench.send(AppendPrompt("call", (token_id,)))
        bench.run()
        steps.append(bench.scheduler._num_steps)
    assert steps == [0] * 63 + [1] * 37
    bench.send(AppendPrompt("call", (), close=True))
    bench.run()
    assert usage(bench, "call").prefilled == 100
    assert usage(bench, "call").re_prefilled == 0


@pytest.mark.parametrize("appended", [1, 5, 14, 15, 30])
@pytest.mark.parametrize("known", [1, 16, 63, 64, 79, 80, 100])
def test_appending_to_an_open_call_prefills_only_the_new_tokens(bench, known, appended):
    result = [(3 * i + 1) % 400 for i in range(appended)]
    bench.submit("call", LONG_PROMPT[:known], max_tokens=4, open=True)
    bench.run()
    bench.send(AppendPrompt("call", tuple(result), close=True))
    bench.run()
    assert usage(bench, "call").prefilled == known + appended
    assert usage(bench, "call").re_prefilled == 0
    assert usage(bench, "call").cached == 0

    fresh = Bench(page_size=PAGE, num_pages=64)
    fresh.submit("whole", LONG_PROMPT[:known] + result, max_tokens=4)
    assert_same(fresh.run()["whole"], bench.calls["call"])
    bench.assert_nothing_leaks()


def test_closing_an_open_call_without_new_tokens_computes_only_the_last_page_again(bench):
    bench.submit("call", LONG_PROMPT[:79], max_tokens=4, open=True)
    bench.run()
    bench.send(AppendPrompt("call", (), close=True))
    bench.run()
    assert usage(bench, "call").prefilled == 79
    assert usage(bench, "call").re_prefilled == 1, "the last token, for its logits"


def test_an_open_call_that_loses_its_pages_computes_them_again():
    bench = Bench(page_size=4, num_pages=16)
    bench.submit("call", PROMPT[:22], max_tokens=4, open=True)
    bench.run()
    bench.submit("large", list(range(100, 155)), max_tokens=8)
    bench.run()
    bench.send(AppendPrompt("call", (5, 6), close=True))
    bench.run()
    assert usage(bench, "call").prefilled == 24
    assert usage(bench, "call").re_prefilled == 22
    fresh = Bench(page_size=4)
    fresh.submit("whole", [*PROMPT[:22], 5, 6], max_tokens=4)
    assert_same(fresh.run()["whole"], bench.calls["call"])


def test_forks_compute_only_the_last_prompt_token(bench):
    bench.submit("parent", PROMPT, max_tokens=6)
    for index in range(3):
        bench.submit(f"fork {index}", PROMPT, max_tokens=6, fork_of="parent")
    bench.run()
    assert usage(bench, "parent").prefilled == 50
    for index in range(3):
        assert usage(bench, f"fork {index}").cached == 49
        assert usage(bench, f"fork {index}").prefilled == 1
        assert_same(bench.calls["parent"], bench.calls[f"fork {index}"])
    bench.assert_nothing_leaks()


def test_a_fork_does_not_write_into_its_parent(bench):
    """The unfinished page is copied: parent and fork go different ways from there."""
    from support.engines import with_seed

    bench.submit("parent", PROMPT, with_seed(1, temperature=2.0, logprobs=2), max_tokens=20)
    bench.submit("fork", PROMPT, with_seed(2, temperature=2.0, logprobs=2), max_tokens=20, fork_of="parent")
    bench.run()
    assert bench.calls["parent"].token_ids != bench.calls["fork"].token_ids
    for seed, call_id in ((1, "parent"), (2, "fork")):
        fresh = Bench(page_size=PAGE, num_pages=64)
        fresh.submit("alone", PROMPT, with_seed(seed, temperature=2.0, logprobs=2), max_tokens=20)
        assert_same(fresh.run()["alone"], bench.calls[call_id])


def test_preemption_keeps_what_was_generated():
    bench = Bench(page_size=4, num_pages=16, num_slots=4)
    for index in range(4):
        bench.submit(f"call {index}", [index, *PROMPT[:9]], max_tokens=30)
    bench.run()
    assert any(decision.action == "preempt" for decision in bench.scheduler.decisions)
    for index in range(4):
        fresh = Bench(page_size=4)
        fresh.submit("alone", [index, *PROMPT[:9]], max_tokens=30)
        assert_same(fresh.run()["alone"], bench.calls[f"call {index}"])
        assert usage(bench, f"call {index}").decoded == 30
    bench.assert_nothing_leaks()


def test_programs_finish_one_after_the_other_under_program_fcfs():
    ends: dict[str, list[str]] = {}
    for order in ("fcfs", "program-fcfs"):
        bench = Bench(order=order, num_slots=1)
        bench.send(OpenProgram("second"))
        for call_id, program in (("a1", "program"), ("b1", "second"), ("a2", "program"), ("b2", "second")):
            bench.calls[call_id] = type("Outcome", (), {})()
            from support.engines import Outcome

            bench.calls[call_id] = Outcome()
            bench.send(SubmitCall(call_id, program, (1, 2, 3), GREEDY, 3))
        bench.run()
        ends[order] = [d.subject for d in bench.scheduler.decisions if d.action == "finish"]
    assert ends == {"fcfs": ["a1", "b1", "a2", "b2"], "program-fcfs": ["a1", "a2", "b1", "b2"]}


@pytest.mark.parametrize("overlap", [False, True])
def test_a_call_that_an_open_call_leaves_no_room_starts_when_that_one_rests(overlap):
    bench = Bench(page_size=4, num_pages=16, max_step_tokens=20, overlap=overlap, admission="greedy")
    bench.submit("open", [5] * 50, open=True)
    bench.step()
    bench.submit("complete", PROMPT, max_tokens=4)
    bench.run()
    assert bench.calls["complete"].end.reason == "length"
