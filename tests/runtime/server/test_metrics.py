"""Metrics read as Prometheus expects, say what was counted, and have labels of few values only."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from treadle.runtime.server.metrics import CONTENT_TYPE, Metrics
from treadle.scheduler import Usage

REPORT = {
    "pages": {"total": 10, "free": 1, "running": 4, "leased": 3, "cached": 2, "host_total": 5, "host_used": 5},
    "calls": {"running": 2, "waiting": 7, "parked": 1},
    "tenants": {},
    "programs": {},
}


def read(metrics):
    """Every sample, by name and labels."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_requests_count_by_endpoint_and_status():
    metrics = Metrics()
    metrics.answered("POST", "/v1/completions", 200, 0.5)
    metrics.answered("POST", "/v1/completions", 429, 0.1)
    found = read(metrics)
    endpoint = "endpoint=/v1/completions", "method=POST"
    assert found["treadle_requests_total", *endpoint, "status=200"] == 1
    assert found["treadle_requests_total", *endpoint, "status=429"] == 1
    assert found["treadle_request_duration_seconds_sum",] == pytest.approx(0.6)


def test_methods_that_nobody_serves_share_a_label():
    metrics = Metrics()
    for number in range(100):
        metrics.answered(f"METHOD{number}", "none", 405, 0.1)
    assert read(metrics)["treadle_requests_total", "endpoint=none", "method=other", "status=405"] == 100


def test_times_of_tokens_are_in_seconds():
    metrics = Metrics()
    metrics.first_token(0.05)
    metrics.next_token(0.02)
    metrics.next_token(0.04)
    found = read(metrics)
    assert found["treadle_time_to_first_token_seconds_sum",] == pytest.approx(0.05)
    assert found["treadle_inter_token_latency_seconds_count",] == 2
    assert found["treadle_inter_token_latency_seconds_bucket", "le=0.025"] == 1


@pytest.mark.parametrize(
    ("usage", "outcome"),
    [
        (Usage(cached=8, prefilled=2), "kept"),
        (Usage(cached=4, re_prefilled=4), "partly_lost"),
        (Usage(re_prefilled=8), "lost"),
    ],
)
def test_a_lease_ends_with_what_was_left_of_its_pages(usage, outcome):
    metrics = Metrics()
    metrics.call_ended(usage, continues=True)
    found = read(metrics)
    assert found["treadle_leases_total", f"outcome={outcome}"] == 1
    assert found["treadle_prompt_tokens_total", "source=cached"] == usage.cached
    assert found["treadle_prompt_tokens_total", "source=computed_again"] == usage.re_prefilled


def test_a_first_call_returns_to_nothing():
    metrics = Metrics()
    metrics.generated(4)
    metrics.call_ended(Usage(prefilled=3, decoded=4), continues=False)
    found = read(metrics)
    assert found["treadle_generated_tokens_total",] == 4
    assert not any(name == "treadle_leases_total" for name, *_ in found)


def test_what_the_scheduler_reports_is_shown_and_routers_of_vllm_find_it():
    metrics = Metrics()
    metrics.inspected(REPORT)
    found = read(metrics)
    assert found["treadle_kv_pages", "state=leased"] == 3
    assert found["treadle_calls", "state=waiting"] == found["vllm:num_requests_waiting",] == 7
    assert found["vllm:num_requests_running",] == 2
    assert found["vllm:kv_cache_usage_perc",] == 0.4


def test_requests_and_programs_are_asked_for_when_somebody_reads():
    metrics, live, programs = Metrics(), [5], {"running": 1, "tool": 2}
    metrics.watch_requests(lambda: 2, lambda: live[0])
    metrics.watch_programs(lambda: programs)
    found = read(metrics)
    assert found["treadle_live_requests", "state=running"] == 3
    assert found["treadle_programs", "state=tool"] == 2
    live[0], programs["tool"] = 2, 7
    found = read(metrics)
    assert found["treadle_live_requests", "state=running"] == 0
    assert found["treadle_programs", "state=tool"] == 7


def test_tools_and_programs_are_measured_as_they_end():
    metrics = Metrics()
    metrics.tool_ended(2.0)
    metrics.program_ended(9.0)
    found = read(metrics)
    assert found["treadle_tool_duration_seconds_sum",] == 2
    assert found["treadle_program_duration_seconds_sum",] == 9


def test_each_server_has_a_registry_of_its_own():
    first, second = Metrics(), Metrics()
    for count in (first.engine_restarted, first.preempted):
        count()
    assert read(first)["treadle_engine_restarts_total",] == read(first)["treadle_preemptions_total",] == 1
    assert read(second)["treadle_engine_restarts_total",] == 0
    assert "process_resident_memory_bytes" in first.render().decode()
    assert CONTENT_TYPE.startswith("text/plain")
