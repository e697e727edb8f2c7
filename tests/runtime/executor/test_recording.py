"""Programs on a real engine, recorded, read back and simulated."""

from __future__ import annotations

import asyncio

import pytest

from treadle.dsl import Chat, In, VarList, llm, program, prompt, tool
from treadle.runtime import SamplingParams
from treadle.runtime.recorder import Recorder
from treadle.scheduler.simulator import hardware
from treadle.scheduler.simulator.clock import Setup, Simulation
from treadle.scheduler.simulator.traces import read

SECRET = "The weaver Penelope undid at night what she had woven by day, and told nobody of it."


@llm(max_tokens=6, temperature=1.0, seed=1)
async def note(text: In[str], about: str) -> str:
    return prompt(f"{SECRET} {text} Write a note about {about}.")


@llm(max_tokens=5, temperature=1.0, seed=2)
async def merge(notes: VarList[str], fact: In[str]) -> str:
    return prompt(f"{SECRET} {notes} and {fact}")


@tool(effects="read")
async def look_up(text: str) -> str:
    """Looks something up."""
    await asyncio.sleep(0.05)
    return text[:3]


async def flow():
    """A call, three beside each other and a tool, a call that joins them, and two turns of a conversation."""
    async with program("flow") as scope:
        first = note("", "looms")
        merged = merge(note.map([first] * 3, about=["warp", "weft", "shed"]), look_up(first))
        await merged
        chat = Chat("You weave.", max_tokens=4, temperature=1.0, seed=3)
        await chat.send(merged)
        await asyncio.sleep(0.05)
        await chat.send("And then?")
    return scope


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.jsonl"


def shape(one):
    """Of each call of a program: stream, what it waits for, and what its pause is for."""
    return [(call.stream, call.after, call.pause_kind, call.tool) for call in one.calls]


async def test_a_program_is_recorded_as_it_was(fast_runtime, path):
    async with fast_runtime(recorder=Recorder(path)):
        scope = await flow()
    (recorded,) = read(path).programs
    assert (recorded.id, recorded.kind) == (f"0/{scope.id}", "flow")
    assert shape(recorded) == [
        ("0", (), "none", ""),
        *[(name, (0,), "none", "") for name in "123"],
        ("4", (1, 2, 3), "tool", "look_up"),
        ("5", (4,), "none", ""),
        ("5", (5,), "person", ""),
    ]
    assert [call.foreseen for call in recorded.calls] == [False, True, True, True, True, False, False]
    usage = scope.account.usage
    assert sum(call.output_tokens for call in recorded.calls) == usage.decoded
    assert sum(call.prompt_tokens for call in recorded.calls) == usage.prefilled + usage.cached
    assert recorded.calls[6].pause_s >= 0.05


async def test_prompts_share_what_they_shared_and_nothing_can_be_read(fast_runtime, path):
    async with fast_runtime(recorder=Recorder(path)):
        await flow()
    workload = read(path)
    (recorded,) = workload.programs
    prompts = [workload.prompt_ids(recorded, index) for index in range(len(recorded.calls))]
    assert prompts[1][:32] == prompts[2][:32] == prompts[0][:32], "they begin with the same sentence"
    assert prompts[1] != prompts[2]
    said = prompts[5] + workload.output_ids(recorded, 5)
    assert prompts[6][: len(said)] == said, "the second turn goes on with the tokens of the first"
    text = path.read_text()
    assert not any(word in text for word in SECRET.replace(".", "").split() if len(word) > 3)
    assert not any(word in text for word in ("weave", "looms", "warp", "then"))


async def test_a_recording_can_be_simulated(fast_runtime, path):
    async with fast_runtime(recorder=Recorder(path)):
        await asyncio.gather(*(flow() for _ in range(3)))
    workload = read(path)
    outcome = Simulation(workload, Setup(hardware.load("cpu-smollm2"), 4096, page_tokens=16)).run()
    assert {record.id for record in outcome.programs} == {one.id for one in workload.programs}
    assert outcome.decoded == sum(call.output_tokens for one in workload.programs for call in one.calls)
    assert all(record.ended - record.began > 0.05 for record in outcome.programs)
    assert outcome.cached > 0


async def test_values_that_are_awaited_and_passed_on_as_text_keep_their_order(fast_runtime, path):
    async with fast_runtime(recorder=Recorder(path)), program("loop"):
        text = ""
        for about in ("warp", "weft"):
            text = await note(text, about)
            text = await look_up(text)
        await asyncio.gather(note(text, "left"), note(text, "right"))
    (recorded,) = read(path).programs
    assert [(after, kind, tool) for _, after, kind, tool in shape(recorded)] == [
        ((), "none", ""),
        ((0,), "tool", "look_up"),
        ((1,), "tool", "look_up"),
        ((1,), "tool", "look_up"),
    ]


async def test_a_program_that_is_left_early_has_the_calls_that_finished(fast_runtime, path):
    async with fast_runtime(recorder=Recorder(path)), program("cut"):
        await note("", "looms")
        async for _ in note.using(max_tokens=1500)("", "ever").stream():
            break
    (recorded,) = read(path).programs
    assert shape(recorded) == [("0", (), "none", "")]


async def test_single_completions_are_programs_of_their_own(fast_runtime, path):
    async with fast_runtime(recorder=Recorder(path)) as runtime:
        await runtime.generate_many(list(range(40)), SamplingParams(seed=1), max_tokens=3, n=2)
        await runtime.generate(list(range(40)), SamplingParams(seed=1), max_tokens=3)
    first, second = read(path).programs
    assert (len(first.calls), len(second.calls)) == (2, 1)
    assert first.calls[0].prompt.part(0, 2) == second.calls[0].prompt.part(0, 2)
    assert second.start_s > first.start_s


async def test_a_disk_that_is_full_does_no_harm(fast_runtime, recwarn):
    async with fast_runtime(recorder=Recorder("/dev/full")):
        for _ in range(2):
            assert (await flow()).account.calls == 7
    told = [str(warning.message) for warning in recwarn if warning.category is RuntimeWarning]
    assert told == ["/dev/full: recording has ended: No space left on device"]
