"""The examples, run as their docstrings say, with the real model."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TREADLE = str(Path(sys.executable).parent / "treadle")
EXAMPLES = Path(__file__).parents[2] / "examples"
PATIENCE = 120.0
"""Seconds. None takes fifteen on a quiet machine with two cores."""

POLITE = {"OMP_WAIT_POLICY": "passive"}
"""Threads that sleep while they wait, where other work shares the cores."""


def run(name: str, *args: str) -> tuple[Any, dict[str, Any]]:
    """The result of an example, and the account of its program."""
    done = subprocess.run(
        [TREADLE, "run", str(EXAMPLES / f"{name}.py"), *args, "--json"],
        env={**os.environ, **POLITE},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (program,) = report["programs"]
    return report["result"], program["account"]


def test_extract_gives_a_person_of_the_declared_shape() -> None:
    person, account = run("extract")
    assert set(person) == {"name", "city", "born_year", "field"}
    assert 1000 <= person["born_year"] <= 2100
    assert person["field"] in {"science", "mathematics", "art", "politics", "other"}
    assert all(0 < len(person[key]) <= 40 for key in ("name", "city"))
    assert account["calls"] == 1


def test_map_reduce_summarises_each_paragraph_and_then_all() -> None:
    summary, account = run("map_reduce", "Bees live in hives and make honey.", "In winter bees eat honey.")
    assert len(summary["parts"]) == 2 and all(summary["parts"])
    assert summary["whole"]
    assert account["calls"] == 3


def test_tool_agent_looks_the_city_up_and_answers() -> None:
    result, account = run("tool_agent")
    assert "Berlin has 3,700,000 people." in result["facts"]
    assert result["answer"]
    assert result["answered_by"] in {"agent", "step limit"}
    assert account["calls"] > 0 and account["tools"] > 0


def test_tool_agent_stays_whole_when_its_tool_fails() -> None:
    result, account = run("tool_agent", "How many people live in Lisbon?", "2")
    assert any("no city 'Lisbon'" in fact for fact in result["facts"])
    assert result["answer"]
    assert account["tools"] > 0


def test_best_of_n_keeps_one_of_four_slogans() -> None:
    campaign, account = run("best_of_n")
    assert campaign["slogan"] and len(campaign["rejected"]) <= 3
    assert campaign["mood"] in {"cheerful", "calm", "serious"}
    assert account["calls"] == 8
    assert account["cached"] > 0


def test_chain_gives_the_story_to_the_next_call() -> None:
    story, account = run("chain", "a lost cat")
    assert story["story"] and story["in_short"]
    assert account["calls"] == 2
    assert [step["name"] for step in account["critical_path"]] == ["write", "shorten"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_example_says_how_to_run_it(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring and f"treadle run examples/{path.name}" in docstring
