"""The README's code runs and prints what the text beside it says."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

from treadle.runtime.cli.demo import demo

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_block_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    verdicts = re.findall(r"^(friendly|dangerous) - \S", done.stdout, re.MULTILINE)
    assert len(verdicts) == 2
    assert "critical path: describe" in done.stdout


def test_the_sketch_makes_the_calls_of_the_demo():
    calls = re.findall(r"^ \w+ = (\w+\(\w.*?\))  ", README, re.MULTILINE)
    assert calls == ["read_order(letter)", "price_of(order)", "reply(order, price)"]
    assert all(call in inspect.getsource(demo) for call in calls)
