"""The tutorial's blocks run, in order, as one session."""

import json
import re
import subprocess
import sys
from pathlib import Path

TUTORIAL = (Path(__file__).parent.parent / "docs" / "tutorial.md").read_text()
SESSION = """
import ast, asyncio, inspect, json, sys

async def session(blocks):
    names = {"__name__": "tutorial"}
    for number, block in enumerate(blocks):
        code = compile(block, f"block {number}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        outcome = eval(code, names)
        if inspect.isawaitable(outcome):
            await outcome

asyncio.run(session(json.load(sys.stdin)))
"""


def test_every_block_runs():
    blocks = re.findall(r"```python\n(.*?)```", TUTORIAL, re.DOTALL)
    assert len(blocks) >= 7
    command = [sys.executable, "-c", SESSION]
    done = subprocess.run(command, input=json.dumps(blocks), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "describe" in done.stdout
    assert "write `if await describe(...)`" in done.stdout
    assert "critical path: chat" in done.stdout
