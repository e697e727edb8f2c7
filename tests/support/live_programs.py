"""Live programs on a real engine, and turns of them as an endpoint does them."""

from __future__ import annotations

from contextlib import asynccontextmanager

from support.engines import GREEDY, checkpoint
from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.client import ThreadedEngine
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.engine.session import Session
from treadle.runtime.server.identity import Identity
from treadle.runtime.server.programs import Programs
from treadle.runtime.server.tenants import EVERYBODY
from treadle.scheduler import SubmitCall

ANY = Identity()


class Bench:
    """Programs on a real engine, and what was told of them."""

    def __init__(self, engine, session, **options):
        self.scheduler = engine.scheduler
        self.session = session
        self.told = []
        self.programs = Programs(session, watchers=[lambda *event: self.told.append(event)], **options)

    def kinds(self):
        return [kind for _, kind, _ in self.told]

    async def settle(self):
        """Waits until the engine has applied all that was sent."""
        program = self.session.open_program()
        await self.session.end_program(program)

    async def nodes(self, program):
        await self.settle()
        graph = self.scheduler.graph(program.id)
        return {node.node_id: (node.kind, node.name, node.inputs, node.extends) for node in graph.nodes()}

    async def turn(self, messages, *, tenant=EVERYBODY, identity=ANY, tool_calls=(), prompt=None, content="fine"):
        """One whole turn, as an endpoint does it. Returns its program, call and message."""
        program = await self.programs.enter(tenant, identity, messages)
        node = self.programs.begin_turn(program, identity, messages)
        call_id = self.session.new_id("call")
        prompt = tuple(range(3, 20)) if prompt is None else prompt
        call = SubmitCall(call_id, program.id, prompt, GREEDY, 6, node_id=node.node_id, extends=node.extends)
        (stream,) = self.session.submit(call)
        ids = [token for tokens in [event async for event in stream] for token in tokens.token_ids]
        message = {"role": "assistant", "content": content}
        if tool_calls:
            message["tool_calls"] = [
                {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}
                for call_id, name in tool_calls
            ]
        reason = stream.finished.reason
        self.programs.end_turn(node, call_id=call_id, message=message, token_ids=ids, finish_reason=reason)
        self.programs.leave_turn(node)
        self.last = (*prompt, *ids), stream.finished
        return program, message


@asynccontextmanager
async def running(**options):
    engine = build_engine(checkpoint("tiny-llama"), None, EngineConfig(dtype="float32", num_pages=256, page_size=4))
    client = ThreadedEngine(engine)
    try:
        async with Session(client) as session:
            bench = Bench(engine, session, **options)
            yield bench
            await bench.programs.close()
    finally:
        client.close()


def said(text):
    return {"role": "user", "content": text}


def result(call_id, text="42"):
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def named(name, **more):
    return Identity(name, "test", **more)
