"""The published files themselves, where they are beside the project."""

from pathlib import Path

import pytest

from treadle.scheduler.simulator.fit import Server, fit, read_run
from treadle.scheduler.simulator.hardware import StepCost, load
from treadle.scheduler.simulator.traces import PauseTable, read, read_rates
from treadle.scheduler.simulator.workload import clip, largest_call_tokens

DATA = Path(__file__).parents[4] / "shared" / "data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the published traces are not here")


@pytest.mark.parametrize(
    ("file", "num_programs", "num_calls"),
    [
        ("claude_code_kv_traces/claude_code_traces_delta.jsonl.gz", 348, 24_669),
        ("mooncake/conversation_trace.jsonl.gz", 12_031, 12_031),
        ("mooncake/synthetic_trace.jsonl.gz", 3_993, 3_993),
        ("lmcache_agent_trace/miniswe.jsonl.xz", 20, 402),
        ("lmcache_agent_trace/magagent.jsonl.xz", 25, 746),
        ("tau_bench/gpt-4o-airline.json.gz", 200, 2_454),
        ("continuum_sample/swe_smith_5_trajectories_with_timings.json.gz", 5, 125),
        ("bfcl/BFCL_v4_multi_turn_base.json.gz", 200, 1_876),
        ("azure_llm_2023/AzureLLMInferenceTrace_code.csv.gz", 8_819, 8_819),
    ],
)
def test_every_trace_is_read_whole(file, num_programs, num_calls):
    workload = read(DATA / file)
    assert len(workload.programs) == num_programs
    assert sum(len(program.calls) for program in workload.programs) == num_calls
    assert len({program.id for program in workload.programs}) == num_programs
    program = workload.programs[-1]
    for index, call in enumerate(program.calls):
        assert len(workload.prompt_ids(program, index)) == call.prompt_tokens
        assert len(workload.output_ids(program, index)) == call.output_tokens


def test_most_prompts_of_claude_code_go_on_with_the_one_before():
    workload = read(DATA / "claude_code_kv_traces/claude_code_traces_delta.jsonl.gz")
    kept = turns = 0
    for program in workload.programs:
        for index, call in enumerate(program.calls):
            following = program.following(index)
            if following is not None:
                turns += 1
                kept += following.prompt.starts_with(call.prompt)
    assert kept / turns == pytest.approx(0.929, abs=0.001)
    assert largest_call_tokens(map(clip, workload.programs)) == 150_000


def test_rates_and_latencies_are_read():
    assert read_rates(DATA / "servegen/deepseek-r1.client_rates.csv.gz").expected == pytest.approx(1_383_669)
    assert len(PauseTable.read(DATA / "tool_latency_quantiles.json").tools) == 21


def test_the_measured_engine_is_what_its_run_gives():
    calls = read_run(DATA / "llmservingsim_measured/vllm_runs/RTX4090_Llama-3.1-8B.requests.jsonl.gz")
    engine = load("rtx-4090-8b")
    guess = StepCost(16.3e-3, 81e-6, engine.step.per_pair_s, engine.step.per_context_token_s)
    found = fit(calls, Server(num_blocks=2588), guess)
    assert engine.step.fixed_s == pytest.approx(found.step.fixed_s, rel=2e-3)
    assert engine.step.per_token_s == pytest.approx(found.step.per_token_s, rel=2e-3)
    assert abs(found.makespan_error) < 0.015
    assert abs(found.mean_decode_error) < 0.01
    assert found.mean_absolute_decode_error < 0.055
