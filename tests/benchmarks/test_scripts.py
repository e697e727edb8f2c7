"""Every benchmark runs, and each of its JSON lines holds what repeats the figure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name != "report.py")
MODELS = {"workflows.py": "smollm2"}
"""Of scripts that need text; for the others random weights will do."""
NEEDED = {"figure", "value", "unit", "model", "dtype", "batch", "new_tokens", "threads", "torch", "cpu", "load_average"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_quick_json_lines_hold_what_repeats_the_figure(script):
    model = MODELS.get(script, "random:tiny-llama")
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--json", "--model", model]
    polite = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env=polite, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines and all(line.keys() >= NEEDED and line["value"] >= 0 for line in lines)
