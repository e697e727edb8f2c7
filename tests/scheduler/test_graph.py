"""The declared graph: bad declarations are refused, and the account tells what the end waited for."""

from __future__ import annotations

import pytest
from support.fake_engine import FakeEngine

from treadle.scheduler import (
    DeclareNode,
    EndProgram,
    OpenProgram,
    ProgramEnded,
    Resume,
    SamplingParams,
    SchedulerConfig,
    SubmitCall,
    Wait,
)

CONFIG = SchedulerConfig(num_pages=64, vocab_size=97, max_context=120, page_size=4, max_nodes=5)


@pytest.fixture
def engine():
    engine = FakeEngine(CONFIG)
    engine.send(OpenProgram("p"))
    return engine


def rejection(events):
    (event,) = events
    return event.subject, event.error


def test_a_node_is_declared_after_its_inputs(engine):
    assert engine.send(DeclareNode("p", "a", "llm")) == []
    assert engine.send(DeclareNode("p", "b", "tool", inputs=("a",))) == []
    assert rejection(engine.send(DeclareNode("p", "c", "llm", inputs=("x",)))) == ("c", "unknown_node")
    assert rejection(engine.send(DeclareNode("p", "c", "llm", extends="x"))) == ("c", "unknown_node")
    assert rejection(engine.send(DeclareNode("q", "a", "llm"))) == ("q", "unknown_program")
    assert [node.node_id for node in engine.scheduler.graph("p").nodes()] == ["a", "b"]


def test_a_node_declared_again_gets_more_inputs(engine):
    engine.send(DeclareNode("p", "a", "llm"), DeclareNode("p", "b", "llm"), DeclareNode("p", "c", "llm", inputs=("a",)))
    assert engine.send(DeclareNode("p", "c", "llm", inputs=("b", "a"))) == []
    assert [(node.node_id, node.inputs) for node in engine.scheduler.graph("p").nodes()][-1] == ("c", ("a", "b"))


def test_a_program_cannot_have_endless_nodes(engine):
    events = [event for index in range(7) for event in engine.send(DeclareNode("p", f"n{index}", "llm"))]
    assert [(e.subject, e.error) for e in events] == [("n5", "overloaded"), ("n6", "overloaded")]


@pytest.mark.parametrize("command", [Wait("p", "x"), Resume("p", "x")])
def test_waiting_for_an_unknown_node_is_rejected(engine, command):
    assert rejection(engine.send(command)) == ("x", "unknown_node")


def test_a_call_for_an_undeclared_node_fails(engine):
    engine.send(SubmitCall("c", "p", (1,), SamplingParams(), 3, node_id="x"))
    assert engine.finished["c"].error == "unknown_node"


def test_the_critical_path_is_the_chain_that_the_end_waited_for(engine):
    engine.send(
        DeclareNode("p", "short", "llm", "short"),
        DeclareNode("p", "long", "llm", "long"),
        DeclareNode("p", "tool", "tool", "search", inputs=("long",)),
        DeclareNode("p", "last", "llm", "last", inputs=("short", "tool")),
        SubmitCall("c1", "p", (1, 2), SamplingParams(), 3, node_id="short"),
        SubmitCall("c2", "p", (3, 4), SamplingParams(), 9, node_id="long"),
    )
    engine.run()
    engine.send(Wait("p", "tool"))
    engine.now += 2.0
    engine.send(Resume("p", "tool"), SubmitCall("c3", "p", (5,), SamplingParams(), 4, node_id="last"))
    engine.run()
    (ended,) = engine.send(EndProgram("p"))
    assert isinstance(ended, ProgramEnded)
    assert [step.name for step in ended.critical_path] == ["long", "search", "last"]
    assert ended.critical_path[1].seconds == pytest.approx(2.0, abs=0.02)
    assert ended.tool_wait_s == pytest.approx(2.0)
    assert sum(step.seconds for step in ended.critical_path) <= ended.duration_s + 1e-9
    assert (ended.calls, ended.nodes) == (3, 4)
