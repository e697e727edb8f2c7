"""Spans of a program share a trace; a client's trace goes on; nothing happens unless it is asked for."""

import subprocess
import sys

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.server.spans import Spans
from treadle.runtime.server.tracing import Period, Tracing, TurnFacts

SECOND = 10**9
CLIENT = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


@pytest.fixture
def tracing():
    exporter = InMemorySpanExporter()
    tracing = Spans(exporter, "smollm2")

    def spans():
        tracing.close()
        return {span.name: span for span in exporter.get_finished_spans()}

    tracing.spans = spans
    return tracing


TRACE_OF_NOBODY = "00-00000000000000000000000000000000-b7ad6b7169203331-01"


def test_turns_and_tools_hang_under_their_program(tracing):
    facts = TurnFacts("p1", {}, 9, 4, 3, ("stop",), 0.5)
    tracing.turn_ended(facts, Period(SECOND, 2 * SECOND))
    tracing.tool_ended("p1", "search", "call_1", Period(2 * SECOND, 3 * SECOND))
    tracing.program_ended("p1", "agent", Period(SECOND, 4 * SECOND))
    spans = tracing.spans()
    program, turn, tool = (spans[name] for name in ("invoke_workflow agent", "chat smollm2", "execute_tool search"))
    assert turn.parent.span_id == tool.parent.span_id == program.context.span_id
    assert program.parent is None
    assert turn.context.trace_id == tool.context.trace_id == program.context.trace_id
    assert (turn.start_time, turn.end_time, turn.kind) == (SECOND, 2 * SECOND, SpanKind.SERVER)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.conversation.id": "p1",
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 0.5,
    }
    assert expected.items() <= dict(turn.attributes).items()
    assert tool.attributes["gen_ai.tool.call.id"] == "call_1"


def test_two_programs_are_two_traces(tracing):
    for program in ("a", "b"):
        tracing.program_ended(program, program, Period(1, 2))
    spans = tracing.spans()
    assert spans["invoke_workflow a"].context.trace_id != spans["invoke_workflow b"].context.trace_id


def test_a_clients_trace_goes_on(tracing):
    tracing.turn_ended(TurnFacts("p1", CLIENT), Period(1, 2))
    turn = tracing.spans()["chat smollm2"]
    assert f"{turn.context.trace_id:032x}" == CLIENT["traceparent"].split("-")[1]
    assert f"{turn.parent.span_id:016x}" == CLIENT["traceparent"].split("-")[2]


@pytest.mark.parametrize("header", ["", "nonsense", TRACE_OF_NOBODY, "x" * 9999])
def test_a_broken_trace_header_changes_nothing(header, tracing):
    tracing.turn_ended(TurnFacts("p1", {"traceparent": header}), Period(1, 2))
    tracing.program_ended("p1", "agent", Period(1, 2))
    spans = tracing.spans()
    assert spans["chat smollm2"].parent.span_id == spans["invoke_workflow agent"].context.span_id


def test_a_failure_is_marked(tracing):
    tracing.turn_ended(TurnFacts("p1", {}, error="429"), Period(1, 2))
    turn = tracing.spans()["chat smollm2"]
    assert turn.status.status_code is StatusCode.ERROR and turn.attributes["error.type"] == "429"


def test_without_an_endpoint_nothing_is_imported():
    code = """
import sys
from treadle.runtime.server.tracing import Period, Tracing, TurnFacts
tracing = Tracing(None, "smollm2")
tracing.turn_ended(TurnFacts("p1", {}), Period(1, 2))
tracing.close()
assert not any(name.startswith("opentelemetry") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_endpoint_without_the_library_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "treadle.runtime.server.spans")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InvalidRequestError, match=r"treadle\[otel\]"):
        Tracing("http://localhost:4318", "smollm2")
