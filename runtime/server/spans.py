"""Spans by OpenTelemetry's conventions for generative AI. Needs the `otel` extra; only `tracing.py` imports this.

    invoke_workflow report                     the program
        chat smollm2                           a turn of it
        execute_tool search                    between two turns

The trace of a program follows from its id. A turn whose request names a trace (W3C `traceparent`) is part of that one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from treadle.runtime.server.tracing import Period, TurnFacts

PROVIDER = "treadle"


@dataclass(frozen=True, slots=True)
class _Ids:
    trace_id: int
    span_id: int


_wanted: ContextVar[_Ids | None] = ContextVar("wanted", default=None)


class _ProgramIds(RandomIdGenerator):
    """Random ids, but for a program's own span: turns and tools have named that as their parent already."""

    def generate_trace_id(self) -> int:
        wanted = _wanted.get()
        return wanted.trace_id if wanted is not None else super().generate_trace_id()

    def generate_span_id(self) -> int:
        wanted = _wanted.get()
        return wanted.span_id if wanted is not None else super().generate_span_id()


def exporter_to(endpoint: str) -> SpanExporter:
    """Sends spans to a collector by OTLP over HTTP."""
    return OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces")


class Spans:
    """What `Tracing` does when it is on."""

    def __init__(self, exporter: SpanExporter, model: str) -> None:
        self._model = model
        resource = Resource.create({"service.name": PROVIDER})
        self._provider = TracerProvider(resource=resource, id_generator=_ProgramIds())
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(PROVIDER)

    def close(self) -> None:
        self._provider.shutdown()

    def turn_ended(self, facts: TurnFacts, period: Period) -> None:
        attributes: dict[str, AttributeValue] = {
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.usage.input_tokens": facts.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": facts.cached_tokens,
            "gen_ai.usage.output_tokens": facts.generated_tokens,
            "gen_ai.response.finish_reasons": tuple(facts.finish_reasons),
        }
        if facts.first_token_s is not None:
            attributes["gen_ai.response.time_to_first_chunk"] = facts.first_token_s
        if facts.error:
            attributes["error.type"] = facts.error
        context = _client_context(facts.headers) or _program_context(facts.program_id)
        kind = trace.SpanKind.SERVER
        self._write("chat", self._model, facts.program_id, attributes, period, context=context, kind=kind)

    def tool_ended(self, program_id: str, name: str, call_id: str, period: Period) -> None:
        attributes = {"gen_ai.tool.name": name, "gen_ai.tool.call.id": call_id}
        self._write("execute_tool", name, program_id, attributes, period, context=_program_context(program_id))

    def program_ended(self, program_id: str, kind: str, period: Period) -> None:
        token = _wanted.set(_ids_of(program_id))
        try:
            attributes = {"gen_ai.workflow.name": kind}
            self._write("invoke_workflow", kind, program_id, attributes, period, context=Context())
        finally:
            _wanted.reset(token)

    def _write(
        self,
        operation: str,
        name: str,
        program_id: str,
        attributes: Mapping[str, AttributeValue],
        period: Period,
        *,
        context: Context,
        kind: trace.SpanKind = trace.SpanKind.INTERNAL,
    ) -> None:
        common: dict[str, AttributeValue] = {"gen_ai.operation.name": operation, "gen_ai.provider.name": PROVIDER}
        common["gen_ai.conversation.id"] = program_id
        span = self._tracer.start_span(
            f"{operation} {name}".strip(),
            context=context,
            kind=kind,
            attributes={**common, **attributes},
            start_time=period.start_ns,
        )
        if "error.type" in attributes:
            span.set_status(trace.StatusCode.ERROR)
        span.end(period.end_ns)


def _client_context(headers: Mapping[str, str]) -> Context | None:
    """The span of the client that a request names; None if it names none."""
    carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
    context = TraceContextTextMapPropagator().extract(carrier, Context())
    return context if trace.get_current_span(context).get_span_context().is_valid else None


def _program_context(program_id: str) -> Context:
    """The program's own span, which is yet to be written."""
    ids, sampled = _ids_of(program_id), trace.TraceFlags(trace.TraceFlags.SAMPLED)
    span = trace.NonRecordingSpan(trace.SpanContext(ids.trace_id, ids.span_id, is_remote=True, trace_flags=sampled))
    return trace.set_span_in_context(span, Context())


def _ids_of(program_id: str) -> _Ids:
    digest = hashlib.sha256(program_id.encode()).digest()
    return _Ids(int.from_bytes(digest[:16]), int.from_bytes(digest[16:24]))
