"""Every benchmark runs, and each of its JSON lines holds what repeats the figure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name != "report.py")
MODELS = {"quality.py": "smollm2", "workflows.py": "smollm2"}
"""Of scripts that need text; for the others random weights will do."""
WITHOUT_MODEL = {"kernel_roofline.py", "policies.py", "scheduler_overhead.py"}
READING = {"quality.py"}
"""Scripts that give a model text, and have it write none."""
NEEDED = {"figure", "value", "unit", "torch", "cpu", "load_average"}
NEEDED_WITH_MODEL = NEEDED | {"model", "dtype", "threads"}
NEEDED_WITH_CALLS = NEEDED_WITH_MODEL | {"batch", "new_tokens"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_quick_json_lines_hold_what_repeats_the_figure(script):
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--json"]
    if script not in WITHOUT_MODEL:
        command += ["--model", MODELS.get(script, "random:tiny-llama")]
    needed = NEEDED if script in WITHOUT_MODEL else NEEDED_WITH_MODEL if script in READING else NEEDED_WITH_CALLS
    polite = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env=polite, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines and all(line.keys() >= needed and line["value"] >= 0 for line in lines)
