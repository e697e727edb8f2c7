"""What a server counts and measures, for Prometheus. No label says whose a request is: their values are few and known.

Times are in seconds. `vllm:...` are the three figures that routers and autoscalers made for vLLM read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from treadle.scheduler import Usage

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
# Bounds of buckets as OpenTelemetry's conventions for generative AI have them.
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
NEXT_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
REQUEST_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOOL_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
METHODS = frozenset({"GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT", "PATCH"})
PAGE_STATES = ("free", "running", "leased", "cached", "host_used")
CALL_STATES = ("running", "waiting", "parked")


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"treadle_{name}", help, labels, registry=registry)

        def gauge(name: str, help: str, *labels: str) -> Gauge:
            return Gauge(f"treadle_{name}", help, labels, registry=registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"treadle_{name}_seconds", help, labels, buckets=buckets, registry=registry)

        self._requests = counter("requests", "Requests that were answered", "method", "endpoint", "status")
        self._durations = histogram("request_duration", "From a request to the end of its answer", REQUEST_S)
        self._live = gauge("live_requests", "Requests that generate, or wait for their first token", "state")
        self._first_token = histogram("time_to_first_token", "From a request to its first token", FIRST_TOKEN_S)
        self._next_token = histogram("inter_token_latency", "From a token of an answer to the next", NEXT_TOKEN_S)
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts, by where their KV came from", "source")
        self._generated = counter("generated_tokens", "Tokens that were generated")
        self._queued = histogram("queue", "Time in which a call had work to do and did not run", REQUEST_S)
        self._leases = counter("leases", "Pages that a program left and came back to: what was left", "outcome")
        self._tools = histogram("tool_duration", "From a tool call to its result", TOOL_S)
        self._program_durations = histogram("program_duration", "From a program's begin to its end", REQUEST_S)
        self._preemptions = counter("preemptions", "Calls that lost their pages while they ran")
        self._restarts = counter("engine_restarts", "Times that the engine's process was started anew")
        self._pages = gauge("kv_pages", "Pages of KV", "state")
        self._programs = gauge("programs", "Programs that are live", "state")
        self._calls = gauge("calls", "Calls in the engine", "state")
        self._vllm = {
            name: Gauge(f"vllm:{name}", f"As vLLM has it: {help}", registry=registry)
            for name, help in (
                ("num_requests_running", "calls that run"),
                ("num_requests_waiting", "calls that wait"),
                ("kv_cache_usage_perc", "share of pages that running calls hold, from 0 to 1"),
            )
        }

    def watch_requests(self, waiting: Callable[[], int], live: Callable[[], int]) -> None:
        """Asks these, whenever somebody reads, for how many requests wait and how many there are."""
        self._live.labels("waiting").set_function(waiting)
        self._live.labels("running").set_function(lambda: live() - waiting())

    def watch_programs(self, states: Callable[[], Mapping[str, int]]) -> None:
        """Asks this, whenever somebody reads, for how many programs are in each state."""
        for state in states():
            self._programs.labels(state).set_function(partial(_of, states, state))

    def answered(self, method: str, endpoint: str, status: int, seconds: float) -> None:
        """A request was answered. `endpoint` is the route as it was declared, never the path that was asked for."""
        self._requests.labels(method if method in METHODS else "other", endpoint, str(status)).inc()
        self._durations.observe(seconds)

    def first_token(self, seconds: float) -> None:
        """A request has its first token."""
        self._first_token.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """An answer has one more token."""
        self._next_token.observe(seconds)

    def generated(self, num_tokens: int) -> None:
        """A call has generated tokens, whether or not it comes to its end."""
        self._generated.inc(num_tokens)

    def call_ended(self, usage: Usage, *, continues: bool) -> None:
        """A call ended; `continues` if it went on from a call that its program had left before.

        Such a call found its pages as they were, or had to compute some of them again, or all.
        """
        self._prompt_tokens.labels("cached").inc(usage.cached)
        self._prompt_tokens.labels("computed").inc(usage.prefilled)
        self._prompt_tokens.labels("computed_again").inc(usage.re_prefilled)
        self._queued.observe(usage.queued_s)
        if continues:
            outcome = "kept" if not usage.re_prefilled else "partly_lost" if usage.cached else "lost"
            self._leases.labels(outcome).inc()

    def tool_ended(self, seconds: float) -> None:
        """What a program waited for has come."""
        self._tools.observe(seconds)

    def program_ended(self, seconds: float) -> None:
        """A program is over."""
        self._program_durations.observe(seconds)

    def preempted(self) -> None:
        """A running call lost its pages."""
        self._preemptions.inc()

    def engine_restarted(self) -> None:
        """The engine died and was started anew."""
        self._restarts.inc()

    def inspected(self, report: Mapping[str, Any]) -> None:
        """Takes over what the scheduler reports of its pages and calls."""
        pages, calls = report["pages"], report["calls"]
        for state in PAGE_STATES:
            self._pages.labels(state).set(pages[state])
        for state in CALL_STATES:
            self._calls.labels(state).set(calls[state])
        self._vllm["num_requests_running"].set(calls["running"])
        self._vllm["num_requests_waiting"].set(calls["waiting"])
        self._vllm["kv_cache_usage_perc"].set(pages["running"] / pages["total"])

    def render(self) -> bytes:
        """All figures in Prometheus' text format, `CONTENT_TYPE`."""
        return generate_latest(self._registry)


def _of(counts: Callable[[], Mapping[str, int]], key: str) -> float:
    return counts()[key]
