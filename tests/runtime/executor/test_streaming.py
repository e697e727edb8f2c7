"""An output goes into other prompts while it is generated, and they are what they are if it was there before."""

from __future__ import annotations

import asyncio
import codecs
import importlib.util
from pathlib import Path
from typing import Literal

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from treadle.dsl import In, llm, program, prompt
from treadle.runtime.engine.text import TextStream
from treadle.runtime.executor.released import ReleasedIds
from treadle.scheduler import AppendPrompt, CallFinished, SubmitCall

CHAIN = Path(__file__).parents[3] / "examples" / "chain.py"
END = "."
TEXT = st.text("ab .\né😀", min_size=1, max_size=6)
STOP = st.text("ab .\né😀", min_size=1, max_size=3)


@llm(max_tokens=24, temperature=1.5)
async def write(topic: In[str]) -> str:
    return prompt(f"Write about {topic}.")


@llm(max_tokens=4, temperature=0)
async def shorten(text: In[str], after: In[str] = "") -> str:
    return prompt(f"{text}{END}{after}")


# Which ids are passed on


def generate(tokenizer, ids, stops, groups):
    """What an engine reports of these ids up to a stop string, in groups, as `(ids, text)`; and the last text."""
    stream, reports, rest = TextStream(tokenizer, stops, tokenizer.eos_token_ids), [], list(ids)
    for size in groups:
        group, text, stopped = [], "", False
        while rest and len(group) < size and not stopped:
            group.append(rest.pop(0))
            piece, stopped = stream.push(group[-1])
            text += piece
        reports.append((tuple(group), text))
        if stopped:
            break
    return reports, stream.finish()


def whole_tokens(tokenizer, ids, text):
    """How many ids say nothing but a beginning of the text, and what the text says after them."""
    best = (0, text)
    for count in range(1, len(ids) + 1):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        said = decoder.decode(b"".join(tokenizer.token_bytes(i) for i in ids[:count] if i not in tokenizer.special_ids))
        is_whole = decoder.getstate() == (b"", 0)
        if is_whole and len(said) <= len(text):
            best = (count, text[len(said) :])
    return best


def bytes_of(tokenizer, text):
    """The text's ids, byte by byte."""
    ids = {tokenizer.token_bytes(token_id): token_id for token_id in range(17, 400)}
    return [ids[bytes([byte])] for byte in text.encode()]


@st.composite
def tokenised(draw, tokenizer):
    """Ids of a text that a tokenizer would hardly choose: of parts alone, some of them byte by byte."""
    ids = []
    for part in draw(st.lists(TEXT, min_size=1, max_size=8)):
        ids += bytes_of(tokenizer, part) if draw(st.booleans()) else tokenizer.encode(part)
    return ids


@given(data=st.data())
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_a_token_is_passed_on_when_all_its_text_is_released_however_tokens_are_grouped(tokenizer, data):
    ids = data.draw(tokenised(tokenizer))
    stops = data.draw(st.lists(STOP, max_size=3))
    groups = data.draw(st.lists(st.integers(1, 4), min_size=len(ids), max_size=len(ids)))
    reports, last = generate(tokenizer, ids, stops, groups)
    text = "".join(text for _, text in reports) + last
    count, rest = whole_tokens(tokenizer, ids, text)
    released, passed, shown = ReleasedIds(tokenizer), (), ""
    for group, piece in reports:
        passed, shown = passed + released.push(group, piece), shown + piece
        assert shown.startswith(tokenizer.decode(passed))
        assert whole_tokens(tokenizer, ids, shown)[0] == len(passed), "nothing is held back without need"
    passed += released.finish(last)
    assert passed == released.token_ids == (*ids[:count], *tokenizer.encode(rest))
    assert tokenizer.decode(passed) == text


def test_text_before_a_stop_string_within_a_token_is_tokenised_alone(tokenizer):
    (dots,) = tokenizer.encode("...")
    once = tokenizer.encode("Once upon")
    released = ReleasedIds(tokenizer)
    assert released.push((*once, dots), "Once upon.") == tuple(once)
    assert released.finish("") == tuple(tokenizer.encode("."))
    assert released.token_ids == (*once, *tokenizer.encode("."))


def test_what_is_held_back_waits(tokenizer):
    (a,), (first, second, third, fourth) = tokenizer.encode("a"), bytes_of(tokenizer, "😀")
    released = ReleasedIds(tokenizer)
    assert released.push((a, first, second), "a") == (a,)
    assert released.push((third, fourth), "") == (), "the character might begin a stop string"
    assert released.push((a,), "😀a") == (first, second, third, fourth, a)
    assert released.push((first,), "") == ()
    assert released.finish("\ufffd") == (first,), "as it was generated, though it is no character"


# In programs


def record(runtime):
    """The commands that a runtime sends from now on."""
    commands, send = [], runtime._engine.send
    runtime._engine.send = lambda batch: (commands.extend(batch), send(batch))[1]
    return commands


def prompt_of(commands, var):
    """The ids of a call's prompt as it was sent, and how many of them came at the beginning."""
    call_id = f"{var.program.id}/{var.node.id}/0"
    (submitted,) = [c for c in commands if isinstance(c, SubmitCall) and c.call_id == call_id]
    appended = [c.token_ids for c in commands if isinstance(c, AppendPrompt) and c.call_id == call_id]
    return (*submitted.token_ids, *(i for ids in appended for i in ids)), len(submitted.token_ids)


def log_of(runtime):
    """What the engine computes and which calls end, in order: `("computed", call, up to)`, `("finished", call)`."""
    scheduler, log = runtime._engine._engine.scheduler, []
    plan, complete = scheduler.plan, scheduler.complete

    def logged_plan(*args, **options):
        planned = plan(*args, **options)
        log.extend(("computed", row.call_id, row.end) for row in (planned.rows if planned else ()))
        return planned

    def logged_complete(*args):
        events = complete(*args)
        log.extend(("finished", event.call_id) for event in events if isinstance(event, CallFinished))
        return events

    scheduler.plan, scheduler.complete = logged_plan, logged_complete
    return log


@given(seed=st.integers(0, 2**30), start=st.floats(0, 1), length=st.integers(1, 4))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_streamed_output_makes_the_prompt_that_a_finished_one_makes(fast_runtime, tokenizer, seed, start, length):
    async def scenario():
        async with fast_runtime() as runtime, program("chain"):
            whole = await write.using(seed=seed)("looms")
            stop = whole[int(start * len(whole)) :][:length]
            assume(stop)
            options = {"seed": seed, "stop": (stop, "\N{SNOWMAN}")}
            commands = record(runtime)
            before = write.using(**options)("looms")
            await before
            after = shorten(before, before)
            streamed = write.using(**options)("looms")
            early = shorten(streamed, streamed)
            assert await early == await after
            assert await before == await streamed == whole[: whole.index(stop)]
            ids, num_known = prompt_of(commands, early)
            assert ids == prompt_of(commands, after)[0]
            count, rest = whole_tokens(tokenizer, before.token_ids, await before)
            value = (*before.token_ids[:count], *tokenizer.encode(rest))
            assert ids[num_known:][: len(value)] == value
            assert f"{await before}{END}{await before}" in tokenizer.decode(ids)

    asyncio.run(scenario())


async def test_an_output_that_might_be_asked_for_again_is_passed_on_when_it_is_right(fast_runtime, tokenizer):
    @llm(max_tokens=8, retries=2, temperature=1.5, stop=" one")
    async def side(of: str) -> Literal["left", "left one"]:
        return prompt(f"Which side of {of}?")

    async with fast_runtime() as runtime, program("typed"):
        commands = record(runtime)
        sides = [side.using(seed=seed)("looms") for seed in range(8)]
        shorter = [shorten(chosen) for chosen in sides]
        for chosen, short in zip(sides, shorter, strict=True):
            await short
            assert await chosen == "left"
            ids, num_known = prompt_of(commands, short)
            assert tokenizer.decode(ids[num_known:]).startswith(f"left{END}")
        assert any(" one" in tokenizer.decode(chosen.token_ids) for chosen in sides), "some met the stop string"


async def test_the_prompt_of_the_chain_example_grows_while_the_story_is_written(fast_runtime):
    spec = importlib.util.spec_from_file_location("examples_chain", CHAIN)
    chain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chain)
    async with fast_runtime() as runtime:
        log = log_of(runtime)
        commands = record(runtime)
        async with program("chain") as scope:
            result = await chain.main.__wrapped__("a fox")
        story, short = (node.output for node in scope.graph.nodes())
    assert story.node.options.stop == ("\n",)
    assert len(story.token_ids) > 40 and await story == result["story"]
    _, num_known = prompt_of(commands, short)
    call_id, story_id = (f"{scope.id}/{var.node.id}/0" for var in (short, story))
    before = log[: log.index(("finished", story_id))]
    assert max(entry[2] for entry in before if entry[:2] == ("computed", call_id)) >= num_known + 32
