from array import array
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.scheduler.simulator.workload import (
    Blocks,
    CallSpec,
    ProgramSpec,
    Workload,
    cap_pauses,
    clip,
    close_prompts,
    half,
    largest_call_tokens,
    next_output,
    select,
    token_ids,
)

SIZE = 4

block_ids = st.lists(st.integers(0, 30), max_size=12)


def program(*calls, name="p", salt="salt"):
    return ProgramSpec(name, "kind", 0.0, tuple(calls), salt)


def call(ids, prompt_tokens, output_tokens=3, stream="main"):
    return CallSpec(stream, Blocks.from_ids(ids), prompt_tokens, output_tokens)


@st.composite
def full_block_calls(draw):
    """Calls as traces of full blocks have them: each keeps some blocks of its stream's last prompt and adds some."""
    calls, before, fresh = [], {}, 0
    for _ in range(draw(st.integers(1, 8))):
        stream = draw(st.sampled_from(["main", "agent"]))
        kept, new = before.get(stream, []), draw(st.integers(0, 5))
        before[stream] = kept[: draw(st.integers(0, 12))] + list(range(fresh, fresh + new))
        fresh += new
        tokens = len(before[stream]) * SIZE + draw(st.integers(0, SIZE - 1))
        calls.append(call(before[stream], max(1, tokens), draw(st.integers(1, 12)), stream))
    return calls


programs_of_full_blocks = full_block_calls()


def assert_continues(one_program, index, after):
    """A prompt and its output are the beginning of the next prompt, or that is the beginning of them."""
    workload = Workload("w", SIZE, (one_program,))
    said = workload.prompt_ids(one_program, index) + workload.output_ids(one_program, index)
    following = token_ids(after.prompt, after.prompt_tokens, SIZE, one_program.salt)
    assert said[: len(following)] == following[: len(said)]


class TestBlocks:
    @given(block_ids)
    def test_keep_their_ids(self, ids):
        blocks = Blocks.from_ids(ids)
        assert list(blocks) == ids
        assert len(blocks) == len(ids)

    @given(block_ids, block_ids)
    def test_are_equal_when_their_ids_are_however_they_were_made(self, first, second):
        joined = Blocks.from_ids(first) + Blocks.from_ids(second)
        assert joined == Blocks.from_ids(first + second)
        assert joined.starts_with(Blocks.from_ids(first))

    @given(block_ids, st.integers(0, 14), st.integers(0, 14))
    def test_have_parts_like_a_list(self, ids, begin, end):
        assert list(Blocks.from_ids(ids).part(begin, end)) == ids[begin:end]

    @given(block_ids, block_ids)
    def test_know_their_beginnings(self, ids, other):
        assert Blocks.from_ids(ids).starts_with(Blocks.from_ids(other)) == (ids[: len(other)] == other)

    def test_refuse_runs_that_are_none(self):
        with pytest.raises(ValueError, match="run of blocks"):
            Blocks.from_runs([(3, -1)])


class TestTokenIds:
    @given(block_ids, st.integers(0, 48), st.text(max_size=3))
    def test_depend_on_salt_block_and_offset_alone(self, ids, count, salt):
        count = min(count, len(ids) * SIZE)
        tokens = token_ids(Blocks.from_ids(ids), count, SIZE, salt)
        alone = [token for block in ids for token in token_ids(Blocks.from_ids([block]), SIZE, SIZE, salt)]
        assert list(tokens) == alone[:count]
        assert all(0 <= token < 2**31 for token in tokens)

    def test_of_different_blocks_differ_from_the_first_one_on(self):
        tokens = token_ids(Blocks(((0, 1000),)), 1000 * SIZE, SIZE, "salt")
        assert len(set(tokens[::SIZE])) == 1000

    def test_of_different_salts_begin_differently(self):
        first = {token_ids(Blocks(((0, 1),)), 1, SIZE, f"salt {number}")[0] for number in range(1000)}
        assert len(first) == 1000

    def test_stay_in_range(self):
        last = Blocks(((2**30 - 3, 3),))
        assert max(token_ids(last, 3 * SIZE, SIZE, "salt")) < 2**31
        with pytest.raises(ValueError, match="cannot be"):
            Blocks.from_runs([(2**30 - 3, 4)])

    def test_need_blocks_that_hold_them(self):
        with pytest.raises(ValueError, match="do not hold 9 tokens"):
            token_ids(Blocks(((0, 2),)), 9, SIZE, "salt")


class TestOutput:
    def test_is_what_the_following_prompt_goes_on_with(self):
        one, two = call([1, 2, 3], 10, 5), call([1, 2, 3, 4, 5], 18)
        whole = token_ids(two.prompt, 18, SIZE, "salt")
        assert next_output(one, two, SIZE, "salt", "x") == whole[10:15]

    def test_is_new_beyond_the_end_of_the_following_prompt(self):
        one, two = call([1, 2, 3], 10, 9), call([1, 2, 3, 4], 13)
        output = next_output(one, two, SIZE, "salt", "x")
        assert output[:3] == token_ids(two.prompt, 13, SIZE, "salt")[10:]
        assert len(output) == 9
        assert not set(output[3:]) & set(token_ids(Blocks(((0, 40),)), 160, SIZE, "salt"))

    @pytest.mark.parametrize("after", [None, call([1, 9, 3, 4], 16), call([1, 2, 3], 9)])
    def test_is_new_when_nothing_goes_on_with_the_whole_prompt(self, after):
        one = call([1, 2, 3], 10, 5)
        known = set(token_ids(Blocks(((0, 40),)), 160, SIZE, "salt"))
        output = next_output(one, after, SIZE, "salt", "x")
        assert len(output) == 5
        assert not known & set(output)

    def test_that_is_new_differs_between_calls_and_not_between_runs(self):
        one = call([1], 4, 6)
        assert next_output(one, None, SIZE, "salt", "x") == next_output(one, None, SIZE, "salt", "x")
        assert next_output(one, None, SIZE, "salt", "x") != next_output(one, None, SIZE, "salt", "y")

    @given(programs_of_full_blocks)
    def test_and_prompt_begin_every_next_prompt_that_keeps_the_full_blocks(self, calls):
        one_program = program(*close_prompts(calls, SIZE, 1000))
        for index, one in enumerate(one_program.calls):
            after = one_program.following(index)
            full = one.prompt_tokens // SIZE
            if after is not None and after.prompt.part(0, full) == one.prompt.part(0, full):
                assert_continues(one_program, index, after)

    @given(programs_of_full_blocks, st.integers(2, 40))
    def test_and_prompt_begin_the_next_prompt_after_clipping_too(self, calls, max_tokens):
        clipped = clip(program(*close_prompts(calls, SIZE, 1000)), max_tokens=max_tokens)
        for index, one in enumerate(clipped.calls):
            after = clipped.following(index)
            needed = -(-one.prompt_tokens // SIZE)
            if after is not None and after.prompt.part(0, needed) == one.prompt.part(0, needed):
                assert_continues(clipped, index, after)


class TestClosePrompts:
    def test_takes_the_last_block_from_the_next_prompt_of_the_stream(self):
        calls = [call([1, 2], 10), call([7], 5, stream="agent"), call([1, 2, 3], 13)]
        closed = close_prompts(calls, SIZE, 100)
        assert [list(one.prompt) for one in closed] == [[1, 2, 3], [7, 101], [1, 2, 3, 100]]

    def test_lets_a_repeated_prompt_keep_its_rest(self):
        closed = close_prompts([call([1, 2], 9), call([1, 2], 10), call([1, 2], 11)], SIZE, 100)
        assert len({one.prompt for one in closed}) == 1

    def test_gives_a_new_block_where_the_prompt_is_rewritten(self):
        closed = close_prompts([call([1, 2], 10), call([1, 5, 6], 12)], SIZE, 100)
        assert list(closed[0].prompt) == [1, 2, 100]

    def test_refuses_a_prompt_that_lacks_more(self):
        with pytest.raises(ValueError, match="1 blocks of 4 tokens for a prompt of 10"):
            close_prompts([call([1], 10)], SIZE, 100)


def test_clipping_cuts_calls_and_prompts_and_leaves_outputs():
    clipped = clip(program(call([1] * 9, 36, 6), call([1], 4, 50), call([1], 3)), max_calls=2, max_tokens=20)
    assert [(one.prompt_tokens, one.output_tokens) for one in clipped.calls] == [(14, 6), (1, 19)]
    assert largest_call_tokens([clipped]) == 20


def test_clipping_leaves_what_calls_wait_for():
    whole = program(
        *(replace(call([1], 1, stream=str(i)), after=after) for i, after in enumerate([(), (), (0, 1), (2,)]))
    )
    assert [one.after for one in clip(whole, max_calls=3).calls] == [(), (), (0, 1)]


def test_calls_wait_for_the_one_before_unless_they_say_for_what():
    plain = program(*(replace(call([1], 1), pause_s=2.0) for _ in range(3)))
    assert [plain.waits_for(index) for index in range(3)] == [(), (0,), (1,)]
    assert [plain.pause_s(index) for index in range(3)] == [0.0, 2.0, 2.0]
    told = replace(plain, calls=(replace(plain.calls[0], after=()), *plain.calls[1:]))
    assert (told.has_graph, plain.has_graph, told.pause_s(0)) == (True, False, 2.0)


@pytest.mark.parametrize(
    ("afters", "complaint"),
    [
        ([(), (1,)], "call 1 cannot wait for"),
        ([(), (-1,)], "call 1 cannot wait for"),
        ([(), ()], "call 1 extends call 0, and does not wait for it"),
    ],
)
def test_calls_wait_for_calls_before_them_and_for_those_that_they_extend(afters, complaint):
    with pytest.raises(ValueError, match=complaint):
        program(*(replace(call([1], 1), after=after) for after in afters))


def test_pauses_are_capped():
    paused = program(*(CallSpec("main", Blocks(((0, 1),)), 1, 1, pause, "tool") for pause in (0.0, 5.0, 500.0)))
    assert [one.pause_s for one in cap_pauses(paused, 60).calls] == [0.0, 5.0, 60]


def test_halves_never_change():
    assert [half(name) for name in ("trace_0001", "trace_0002", "trace_0003", "trace_0004")] == [
        "tune",
        "tune",
        "report",
        "tune",
    ]
    assert 450 < sum(half(str(number)) == "tune" for number in range(1000)) < 550


def test_a_sample_follows_its_seed_and_keeps_the_order():
    workload = Workload("w", SIZE, tuple(program(call([1], 1), name=str(number)) for number in range(50)))
    first = [one.id for one in select(workload, 1, 10).programs]
    assert first == [one.id for one in select(workload, 1, 10).programs]
    assert first != [one.id for one in select(workload, 2, 10).programs]
    assert first == sorted(first, key=int)
    with pytest.raises(ValueError, match="has 50 programs, not 51"):
        select(workload, 1, 51)


@pytest.mark.parametrize(
    "wrong", [{"prompt_tokens": 0}, {"output_tokens": 0}, {"pause_s": -1.0}, {"pause_s": float("nan")}]
)
def test_a_call_has_tokens_and_no_negative_pause(wrong):
    fields = {"stream": "main", "prompt": Blocks(), "prompt_tokens": 1, "output_tokens": 1} | wrong
    with pytest.raises(ValueError, match=r"tokens|seconds"):
        CallSpec(**fields)


def test_ids_are_what_a_call_is_submitted_with():
    workload = Workload("w", SIZE, (program(call([1, 2], 8)),))
    assert isinstance(workload.prompt_ids(workload.programs[0], 0), array)
    assert workload.prompt_ids(workload.programs[0], 0).typecode == "i"
