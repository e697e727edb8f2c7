"""Whatever a model would rather write, typed output fits its type: through the whole engine, with random weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "structured_output.py"
COUNT = 200


def test_nearly_all_calls_finish_and_everything_finished_fits_its_schema():
    command = [sys.executable, str(SCRIPT), "--json", "--schemas", str(COUNT), "--seed", "0", "--dtype", "float32"]
    polite = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env=polite, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    counts = {line["figure"].removeprefix("schemas_"): line["value"] for line in lines if line["unit"] == "schemas"}
    assert counts["invalid"] == 0
    assert counts["refused"] == 0, done.stderr
    assert counts["valid"] >= 0.95 * COUNT, done.stderr
    assert sum(counts.values()) == COUNT
