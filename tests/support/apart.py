"""Runs the tests of a folder in a process of their own, and reports each as if it had run here.

Triton decides when it is first imported whether kernels are interpreted or compiled, other tests import it too, and a
compiler that crashes should not take them along. A folder's conftest defines `pytest_pyfunc_call` with this.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

MARK = "TREADLE_TESTS_APART"
"""Set in the other process."""
OUTCOMES = pytest.StashKey[dict[Path, dict[tuple[str, str], ElementTree.Element]]]()


def run_apart(item: pytest.Function, environment: dict[str, str]) -> bool | None:
    """Gives a test the outcome that it had in another process, with these variables in its environment.

    The first test of a folder runs all that were selected of it. None, which lets the test run, in that process.
    """
    if MARK in os.environ:
        return None
    folder = item.path.parent
    outcomes = item.session.stash.setdefault(OUTCOMES, {})
    if folder not in outcomes:
        selected = [other.nodeid for other in item.session.items if folder in other.path.parents]
        outcomes[folder] = _run(selected, item, environment)
    outcome = outcomes[folder].get((item.path.stem, item.name))
    if outcome is None:
        pytest.fail("the process of its own ended without a result of this test", pytrace=False)
    for failure in (*outcome.findall("failure"), *outcome.findall("error")):
        pytest.fail(failure.text or "", pytrace=False)
    for skipped in outcome.findall("skipped"):
        pytest.skip(skipped.get("message", ""))
    return True


def _run(
    node_ids: list[str], item: pytest.Function, environment: dict[str, str]
) -> dict[tuple[str, str], ElementTree.Element]:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n0", f"--junitxml={results}", *node_ids]
        done = subprocess.run(
            command,
            cwd=item.config.rootpath,
            env={**os.environ, **environment, MARK: "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if not results.exists():
            pytest.fail(f"{' '.join(command[:3])} ended with {done.returncode}:\n{done.stdout}", pytrace=False)
        cases = ElementTree.parse(results).iter("testcase")
        return {(case.get("classname", "").rpartition(".")[2], case.get("name", "")): case for case in cases}
