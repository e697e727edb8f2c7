"""What a session asks of an engine beside calls: to compile ahead, to say what is there, and what it decides."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import lru_cache

import pytest
from support.engines import GREEDY

from treadle.grammar import JSONSchema, constraint_to_json
from treadle.grammar.compiler import Compiler
from treadle.runtime.config import cache_dir
from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.client import ThreadedEngine
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.engine.session import Session
from treadle.runtime.errors import EngineClosedError, InvalidRequestError
from treadle.runtime.models import SHAPES, RandomCheckpoint, resolve
from treadle.runtime.text.tokenizer import load_tokenizer
from treadle.scheduler import DeclareNode, Hint, Resume, SubmitCall, Wait

SCHEMA = JSONSchema(json.dumps({"type": "array", "items": {"type": "boolean"}}), strict=True)
CONFIG = EngineConfig(dtype="float32", num_pages=256, page_size=4, num_slots=2, num_threads=1)


@lru_cache
def model():
    tokenizer = load_tokenizer(resolve("smollm2", cache_dir(), pull=True))
    return RandomCheckpoint(replace(SHAPES["tiny-llama"], vocab_size=tokenizer.vocab_size)), tokenizer


@asynccontextmanager
async def running(*, with_text=True):
    checkpoint, tokenizer = model()
    engine = build_engine(checkpoint, tokenizer if with_text else None, CONFIG)
    client = ThreadedEngine(engine)
    try:
        async with Session(client) as session:
            yield engine, session
    finally:
        client.close()


async def finished(stream):
    async for _ in stream:
        pass
    return stream.finished


async def test_a_grammar_is_compiled_before_the_call_that_needs_it(monkeypatch):
    compiled, work = [], Compiler._compile

    def counted(self, source, salt):
        compiled.append(salt)
        return work(self, source, salt)

    monkeypatch.setattr(Compiler, "_compile", counted)
    async with running() as (_, session):
        assert await session.prepare(SCHEMA, "us") == ()
        assert compiled == ["us"]
        for tenant, times in (("us", ["us"]), ("them", ["us", "them"])):
            program = session.open_program(tenant=tenant)
            call = SubmitCall(session.new_id("call"), program, (1,), GREEDY, 4, constraint=constraint_to_json(SCHEMA))
            (stream,) = session.submit(call)
            await finished(stream)
            assert compiled == times


async def test_what_a_grammar_does_not_guarantee_is_told():
    async with running() as (_, session):
        loose = JSONSchema(json.dumps({"type": "array", "uniqueItems": True}), strict=False)
        assert await session.prepare(loose) == ("/uniqueItems",)


@pytest.mark.parametrize(
    ("with_text", "schema", "message"),
    [(True, '{"type": 5}', "schema"), (True, "{", "no JSON"), (False, "{}", "without a tokenizer")],
)
async def test_a_grammar_that_cannot_be_is_refused_with_the_reason(with_text, schema, message):
    async with running(with_text=with_text) as (_, session):
        with pytest.raises(InvalidRequestError, match=message):
            await session.prepare(JSONSchema(schema, strict=True))


async def test_every_page_and_call_is_told_once():
    async with running() as (engine, session):
        ours, theirs = session.open_program("agent", "us"), session.open_program("agent", "them")
        calls = [SubmitCall(f"c{index}", (ours, theirs)[index % 2], (1, 2, 3), GREEDY, 100) for index in range(4)]
        streams = session.submit(*calls)
        await anext(aiter(streams[0]))
        report = await session.inspect()
        assert report["calls"] == {"running": 2, "waiting": 2, "parked": 0}
        pages = report["pages"]
        assert pages["total"] == 256 == sum(pages[name] for name in ("free", "running", "leased", "cached"))
        assert report["tenants"].keys() == {"us", "them"}
        assert sum(held["running_pages"] for held in report["tenants"].values()) == pages["running"]
        assert report["page_bytes"] == engine.runner.state.page_bytes
        assert report["programs"][ours]["state"] == "running"
        assert "calls" not in report["programs"][ours]
        calls = {}
        for program in (ours, theirs):
            calls |= (await session.inspect(program))["programs"][program]["calls"]
        waiting = [call for call in calls.values() if call["status"] == "waiting"]
        assert [(call["prompt_tokens"], call["waits_s"] > 0) for call in waiting] == [(3, True), (3, True)]
        for stream in streams:
            await finished(stream)
        pages = (await session.inspect())["pages"]
        assert pages["running"] == 0 < pages["leased"]
        await session.end_program(ours)
        await session.end_program(theirs)
        report = await session.inspect()
        assert report["pages"]["leased"] == 0
        assert report["pages"]["free"] + report["pages"]["cached"] == 256
        assert report["tenants"] == report["programs"] == {}


async def test_a_program_is_told_with_its_graph_its_leases_and_why_it_waits():
    async with running() as (_, session):
        program = session.open_program("agent")
        session.send(DeclareNode(program, "ask", "llm", "ask"))
        (stream,) = session.submit(SubmitCall("c", program, tuple(range(20)), GREEDY, 3, node_id="ask"))
        await finished(stream)
        session.send(DeclareNode(program, "look", "tool", "look", inputs=("ask",)), Wait(program, "look"))
        detail = (await session.inspect(program))["programs"][program]
        assert (detail["state"], list(detail["outside"])) == ("outside", ["look"])
        assert [(node["id"], node["kind"], node["inputs"]) for node in detail["nodes"]] == [
            ("ask", "llm", []),
            ("look", "tool", ["ask"]),
        ]
        (lease,) = detail["leases"]
        assert (lease["owner"], lease["waits_for"]) == ("c", "look")
        assert [d["action"] for d in detail["decisions"]] == ["admit", "finish"]
        json.dumps(detail, allow_nan=False)
        session.send(Resume(program, "look"))
        assert (await session.inspect(program))["programs"][program]["state"] == "idle"
        assert (await session.inspect("nobody"))["programs"] == {}


async def test_what_is_retained_for_ever_can_still_be_told_as_json():
    async with running() as (_, session):
        program = session.open_program("agent")
        (stream,) = session.submit(SubmitCall("c", program, tuple(range(20)), GREEDY, 3))
        await finished(stream)
        answer = await session.ask(Hint("h", program, "demote"))
        assert answer.outcome == "granted"
        (lease,) = (await session.inspect(program))["programs"][program]["leases"]
        assert lease["expected_s"] is None


async def test_decisions_are_told_to_everybody_who_watches_and_only_then():
    async with running() as (engine, session):
        program, seen = session.open_program(), ([], [])

        async def watch(index):
            async for decision in session.decisions():
                seen[index].append((decision.action, decision.subject, decision.program_id))
                if decision.action == "finish":
                    return

        async def call(name):
            (stream,) = session.submit(SubmitCall(name, program, (1, 2), GREEDY, 2))
            await finished(stream)

        await call("before")
        watchers = [asyncio.create_task(watch(index)) for index in range(2)]
        await asyncio.sleep(0)
        await call("c")
        await asyncio.gather(*watchers)
        assert seen[0] == seen[1] == [("admit", "c", program), ("finish", "c", program)]
        await call("after")
        assert engine.scheduler.take_decided() is None


async def test_an_end_of_the_engine_ends_every_wait():
    async with running() as (engine, session):

        def die(*_, **__):
            raise RuntimeError("an unlucky step")

        async def watch():
            return [decision async for decision in session.decisions()]

        watcher = asyncio.create_task(watch())
        await asyncio.sleep(0)
        engine.scheduler.apply = die
        with pytest.raises(EngineClosedError):
            await session.inspect()
        assert await watcher == []
