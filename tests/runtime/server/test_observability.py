"""What a live server tells of itself: figures for Prometheus, spans for a collector."""

import http.server
import threading
import time

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def figures(url):
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.05)


def test_a_request_shows_in_every_figure_that_it_is_about(serve):
    with serve() as server:
        body = {"model": "treadle", "prompt": list(range(40)), "max_tokens": 5}
        assert httpx.post(f"{server.v1}/completions", json=body).status_code == 200
        found = figures(server.url)
        assert found["treadle_requests_total", "/v1/completions", "POST", "200"] == 1
        assert found["treadle_time_to_first_token_seconds_count",] == 1
        assert found["treadle_inter_token_latency_seconds_count",] == 4
        assert found["treadle_prompt_tokens_total", "computed"] == 40
        assert found["treadle_generated_tokens_total",] == 5
        assert found["treadle_live_requests", "running"] == found["treadle_live_requests", "waiting"] == 0
        assert sum(found["treadle_programs", state] for state in ("running", "tool", "person", "idle")) == 1
        until(lambda: ("treadle_kv_pages", "leased") in figures(server.url))
        pages = figures(server.url)
        states = ("free", "running", "leased", "cached")
        assert sum(pages["treadle_kv_pages", state] for state in states) == server.server.engine.num_pages
        assert pages["vllm:num_requests_running",] == 0


def test_a_tool_that_came_back_was_measured(serve):
    with serve() as server, httpx.Client(base_url=server.v1, timeout=60) as client:
        opening = [{"role": "user", "content": "weather?"}]
        body = {"model": "treadle", "tools": [WEATHER], "tool_choice": "required", "max_tokens": 200}
        message = client.post("/chat/completions", json={**body, "messages": opening}).json()["choices"][0]["message"]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "rain"} for call in message["tool_calls"]]
        client.post(
            "/chat/completions", json={"model": "treadle", "messages": [*opening, message, *results], "max_tokens": 2}
        )
        found = figures(server.url)
        assert found["treadle_tool_duration_seconds_count",] == len(results) > 0
        assert found["treadle_leases_total", "kept"] == 1


@pytest.fixture
def collector():
    """Takes spans, as a collector of OpenTelemetry does, and gives their names and attributes."""
    spans = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        spans[span.name] = {item.key: item.value for item in span.attributes}
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", spans
    server.shutdown()
    thread.join()
    server.server_close()


def test_turns_and_programs_reach_a_collector_without_what_was_said(serve, collector):
    endpoint, spans = collector
    with serve(otlp_endpoint=endpoint) as server:
        messages = [{"role": "user", "content": "a secret"}]
        body = {"model": "treadle", "messages": messages, "max_tokens": 3}
        answer = httpx.post(f"{server.v1}/chat/completions", json=body, headers={"x-treadle-program-id": "p1"})
        assert answer.status_code == 200
        httpx.delete(f"{server.v1}/programs/p1")
    turn = spans["chat smollm2"]
    assert turn["gen_ai.usage.output_tokens"].int_value == 3
    assert turn["gen_ai.conversation.id"].string_value
    assert any(name.startswith("invoke_workflow") for name in spans)
    assert "secret" not in repr(spans)
