"""An engine whose process is killed at any moment: nobody who waits for a token loses one, or hears one twice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from support.engines import GREEDY, Outcome, assert_same
from support.small_model import write_small_model

from treadle.grammar import JSONSchema, constraint_to_json
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.engine.session import Session
from treadle.runtime.engine.supervisor import Restarts, open_engine_process
from treadle.runtime.errors import EngineClosedError, InvalidRequestError, ModelNotFoundError
from treadle.scheduler import (
    AppendPrompt,
    CallFinished,
    DeclareNode,
    OpenProgram,
    Rejected,
    Resume,
    SamplingParams,
    SubmitCall,
    Wait,
)

TINY = EngineConfig(dtype="float32", num_pages=2048, page_size=4, num_slots=16, num_threads=1)
OFTEN = Restarts(most=100, window_s=60.0, pause_s=0.01)
WAYS = (
    GREEDY,
    replace(GREEDY, temperature=1.2, seed=5),
    replace(GREEDY, temperature=0.9, seed=6, top_p=0.9, frequency_penalty=0.5),
)


@asynccontextmanager
async def running(model="random:tiny-llama", config=TINY, limit=OFTEN):
    async with open_engine_process(model, config, limit) as engine, Session(engine) as session:
        await engine.ready()
        yield engine, session


def kill(engine, number=signal.SIGKILL):
    os.kill(engine.pid, number)


def submit(session, program, count, max_tokens=150):
    """Calls that differ in length and in how they sample."""
    calls = [
        SubmitCall(
            session.new_id("call"),
            program,
            tuple(range(1, 4 + index)),
            WAYS[index % len(WAYS)],
            max_tokens + index,
        )
        for index in range(count)
    ]
    return session.submit(*calls)


async def outcome_of(stream) -> Outcome:
    outcome = Outcome()
    async for tokens in stream:
        outcome.token_ids += tokens.token_ids
        outcome.logprobs += tokens.logprobs
    outcome.end = stream.finished
    return outcome


async def outcomes(streams) -> list[Outcome]:
    return await asyncio.gather(*map(outcome_of, streams))


async def assert_no_page_is_held(session):
    """Once all programs have ended, every page is free or only cached, and no call is left."""
    report = await session.inspect()
    pages = report["pages"]
    assert pages["running"] == pages["leased"] == 0
    assert pages["free"] + pages["cached"] == pages["total"]
    assert report["calls"] == {"running": 0, "waiting": 0, "parked": 0}
    assert report["programs"] == {}


async def test_streams_go_on_through_kills_and_say_what_they_would_have_said():
    async with running() as (engine, session):
        program = session.open_program()
        expected = await outcomes(submit(session, program, 24))
        streams = submit(session, program, 24)
        work = asyncio.create_task(outcomes(streams))
        chance = random.Random(1)
        for _ in range(5):
            await engine.ready()
            await asyncio.sleep(chance.uniform(0.0, 0.3))
            if work.done():
                break
            pid = engine.pid
            kill(engine)
            while (engine.pid == pid or not engine.is_ready) and not work.done():
                await asyncio.sleep(0.005)
        actual = await work
        assert engine.restarts >= 3
        for left, right in zip(expected, actual, strict=True):
            assert right.end.reason == "length"
            assert right.end.usage.decoded == len(right.token_ids)
            assert_same(left, right)
        account = await session.end_program(program)
        assert account.calls == 48
        assert account.usage.decoded == sum(len(outcome.token_ids) for outcome in expected + actual)
        await assert_no_page_is_held(session)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
async def test_whatever_kills_it_another_one_goes_on(number):
    async with running() as (engine, session):
        streams = submit(session, session.open_program(), 2)
        first, pid = await anext(aiter(streams[0])), engine.pid
        kill(engine, number)
        rest = await outcomes(streams)
        assert (engine.restarts, engine.pid != pid) == (1, True)
        assert len(first.token_ids) + len(rest[0].token_ids) == 150
        assert len(rest[1].token_ids) == 151


async def test_an_open_call_keeps_the_prompt_that_was_appended():
    async def answer(session, program, disturb):
        (stream,) = session.submit(SubmitCall(session.new_id("call"), program, (1, 2, 3), GREEDY, 20, open=True))
        session.send(AppendPrompt(stream.call_id, tuple(range(4, 40))))
        await session.inspect()
        await disturb()
        session.send(AppendPrompt(stream.call_id, (40, 41)))
        session.send(AppendPrompt(stream.call_id, (), close=True))
        return await outcome_of(stream)

    async with running() as (engine, session):

        async def nothing():
            pass

        async def death():
            kill(engine)
            while engine.is_ready:
                await asyncio.sleep(0.001)

        program = session.open_program()
        expected = await answer(session, program, nothing)
        actual = await answer(session, program, death)
        assert_same(expected, actual)
        assert engine.restarts == 1


async def test_programs_and_what_they_wait_for_outlive_it():
    async with running() as (engine, session):
        program = session.open_program(kind="agent", tenant="someone")
        session.send(DeclareNode(program, "look", "tool", "look"), Wait(program, "look"))
        await session.inspect()
        kill(engine)
        await asyncio.sleep(0.05)
        report = await session.inspect(program)
        assert report["programs"][program]["state"] == "outside"
        assert report["programs"][program]["outside"]["look"] >= 0.05
        assert report["tenants"]["someone"]["programs"] == 1
        session.send(Resume(program, "look"))
        account = await session.end_program(program)
        assert account.tool_wait_s >= 0.05
        await assert_no_page_is_held(session)


async def test_what_is_sent_before_it_has_loaded_is_not_lost():
    async with open_engine_process("random:tiny-llama", TINY) as engine, Session(engine) as session:
        assert not engine.is_ready
        program = session.open_program()
        (stream,) = submit(session, program, 1, 5)
        assert len((await outcome_of(stream)).token_ids) == 5


async def test_a_call_can_be_aborted_while_there_is_no_engine():
    async with running() as (engine, session):
        program = session.open_program()
        stream, other = submit(session, program, 2)
        await anext(aiter(stream))
        kill(engine)
        while engine.is_ready:
            await asyncio.sleep(0.001)
        stream.abort()
        first, second = await outcomes([stream, other])
        assert first.end.reason == "aborted"
        assert second.end.reason == "length"
        await session.end_program(program)
        await assert_no_page_is_held(session)


async def test_decisions_are_told_through_a_death_too():
    async with running() as (engine, session):
        program, seen = session.open_program(), []

        async def watch():
            async for decision in session.decisions():
                seen.append(decision)

        watcher = asyncio.create_task(watch())
        await outcomes(submit(session, program, 1, 3))
        kill(engine)
        streams = submit(session, program, 1, 3)
        await outcomes(streams)
        assert [(d.action, d.program_id) for d in seen if d.subject == streams[0].call_id] == [
            ("admit", program),
            ("finish", program),
        ]
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        await outcomes(submit(session, program, 1, 3))
        assert all(d.subject != "call-99" for d in seen)


async def test_a_crash_loop_ends_in_an_error_for_everybody():
    async with running(limit=Restarts(most=2, window_s=60.0, pause_s=0.01)) as (engine, session):
        program = session.open_program()
        work = [asyncio.create_task(outcome_of(stream)) for stream in submit(session, program, 5, 900)]
        for _ in range(3):
            while not engine.is_ready:
                await asyncio.sleep(0.005)
            kill(engine)
            while engine.is_ready:
                await asyncio.sleep(0.001)
        for result in await asyncio.gather(*work, return_exceptions=True):
            assert isinstance(result, EngineClosedError)
            assert "killed by SIGKILL" in str(result)
        assert engine.restarts == 2
        with pytest.raises(EngineClosedError, match="killed by SIGKILL"):
            await session.inspect()
        with pytest.raises(EngineClosedError, match="killed by SIGKILL"):
            engine.send([OpenProgram("late")])


@pytest.mark.parametrize(
    ("model", "config", "kind", "message"),
    [
        ("random:nothing", TINY, ModelNotFoundError, "no shape is called 'nothing'"),
        ("random:tiny-llama", replace(TINY, num_pages=10**12), InvalidRequestError, "use fewer pages"),
    ],
)
async def test_what_keeps_it_from_loading_is_raised_and_told_to_calls(model, config, kind, message):
    async with open_engine_process(model, config) as engine, Session(engine) as session:
        program = session.open_program()
        (stream,) = submit(session, program, 1)
        with pytest.raises(kind, match=message):
            await engine.ready()
        with pytest.raises(EngineClosedError, match=f"the engine is gone: .*{message}"):
            await outcome_of(stream)
        assert engine.restarts == 0


async def test_closing_while_it_loads_leaves_nothing_behind():
    engine = open_engine_process("random:tiny-llama", TINY)
    while engine.pid is None:
        await asyncio.sleep(0.001)
    pid = engine.pid
    await engine.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(EngineClosedError, match="closed before it had loaded"):
        await engine.ready()


async def test_closing_ends_the_process_and_the_calls():
    engine = open_engine_process("random:tiny-llama", TINY)
    async with Session(engine) as session:
        (stream,) = submit(session, session.open_program(), 1, 900)
        await anext(aiter(stream))
        pid = engine.pid
        await engine.close()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        with pytest.raises(EngineClosedError):
            await outcome_of(stream)
    with pytest.raises(EngineClosedError, match="open a new one"):
        engine.send([OpenProgram("late")])


async def test_what_cannot_be_written_is_refused_and_nothing_else():
    async with open_engine_process("random:tiny-llama", TINY) as engine:
        await engine.ready()
        engine.send(
            [
                OpenProgram("p"),
                OpenProgram("\ud800"),
                SubmitCall("seed", "p", (1,), SamplingParams(seed=2**80)),
                SubmitCall("stop", "p", (1,), SamplingParams(stop=("\udfff",))),
                SubmitCall("good", "p", (1, 2), GREEDY, 3),
            ]
        )
        ended, refused = {}, []
        async for batch in engine.events():
            ended |= {event.call_id: event for event in batch if isinstance(event, CallFinished)}
            refused += [event for event in batch if isinstance(event, Rejected)]
            if len(ended) == 3:
                break
        assert (ended["seed"].error, ended["stop"].error, ended["good"].error) == ("bad_text", "bad_text", None)
        assert [event.subject for event in refused] == ["\ud800"]


async def test_grammars_are_compiled_in_the_process_and_followed_through_a_death():
    schema = JSONSchema('{"type": "array", "items": {"type": "integer"}, "minItems": 12, "maxItems": 12}')
    async with running("smollm2", replace(TINY, page_size=16, num_pages=256)) as (engine, session):
        assert await session.prepare(schema) == ()
        with pytest.raises(InvalidRequestError, match="schema"):
            await session.prepare(JSONSchema('{"type": "no such type"}', strict=True))
        program, texts, constraint = session.open_program(), [], constraint_to_json(schema)
        for dies in (False, True):
            call = SubmitCall(session.new_id("call"), program, (1, 2, 3), GREEDY, 60, constraint=constraint)
            (stream,) = session.submit(call)
            text = ""
            async for tokens in stream:
                text += tokens.text
                if dies and len(text) > 8:
                    kill(engine)
                    dies = False
            texts.append(text + stream.finished.text)
        assert engine.restarts == 1
        assert texts[0] == texts[1]
        assert texts[0].startswith("[")


async def test_an_engine_that_can_be_loaded_no_more_is_tried_again_and_then_given_up(tmp_path):
    model = write_small_model(tmp_path)
    async with running(str(model), limit=Restarts(most=3, window_s=60.0, pause_s=0.01)) as (engine, session):
        (stream,) = submit(session, session.open_program(), 1, 900)
        await anext(aiter(stream))
        (model / "model.safetensors").unlink()
        kill(engine)
        with pytest.raises(EngineClosedError, match=r"the engine is gone: .*model\.safetensors"):
            await outcome_of(stream)
        assert engine.restarts == 3
