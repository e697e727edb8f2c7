"""`treadle run --record`, and what `treadle simulate` makes of it."""

from __future__ import annotations

import json

import pytest

SCRIPT = """
from treadle.dsl import In, llm, program, prompt

@llm(max_tokens=4)
async def write(topic: In[str]) -> str:
    return prompt(f"Write about {topic}.")

@program
async def main() -> str:
    return await write(write("looms"))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "flow.py"
    path.write_text(SCRIPT)
    return str(path)


def test_runs_are_appended_and_simulated(treadle, script, tmp_path):
    trace = tmp_path / "trace.jsonl"
    for _ in range(2):
        done = treadle("run", script, "--record", str(trace), "--json")
        assert done.returncode == 0, done.stderr
    assert len(trace.read_text().splitlines()) == 2
    asked = ("--engine", "cpu-smollm2", "--pool", "10K", "--recorded", "--policy", "treadle", "--json")
    done = treadle("simulate", "--trace", str(trace), *asked)
    assert (done.returncode, done.stderr) == (0, "")
    line = json.loads(done.stdout)
    assert (line["total"], line["decoded"], line["trace"]) == (2, 4 * 4, "trace")
    assert line["slowdown_max"] >= 1


def test_a_path_that_cannot_be_written_is_told_before_anything_runs(treadle, script, tmp_path):
    done = treadle("run", script, "--record", str(tmp_path / "nowhere" / "trace.jsonl"))
    assert done.returncode == 1 and not done.stdout
    assert "programs cannot be recorded here: No such file or directory; give the path of a file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_line_is_named(treadle, script, tmp_path):
    trace = tmp_path / "trace.jsonl"
    treadle("run", script, "--record", str(trace))
    with trace.open("a") as file:
        file.write(trace.read_text()[:50])
    done = treadle("simulate", "--trace", str(trace), "--pool", "10K")
    assert done.returncode == 1 and "trace.jsonl:2: not JSON" in done.stderr and "Traceback" not in done.stderr
