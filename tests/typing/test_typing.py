"""The surface keeps its types: two checkers see what right.py says, and report exactly the marked lines of wrong.py."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TREE = ROOT / ".venv" / "tree"
BIN = Path(sys.executable).parent


def marked_lines(checker: str) -> set[int]:
    lines = (HERE / "wrong.py").read_text().splitlines()
    marks = {number: re.search(r"# error(?:: (\w+))?$", line) for number, line in enumerate(lines, 1)}
    return {number for number, mark in marks.items() if mark and mark[1] in (None, checker)}


def mypy_errors(tmp_path: Path) -> list[tuple[str, int, str]]:
    command = [BIN / "mypy", "--strict", "--cache-dir", ROOT / ".mypy_cache", HERE / "right.py", HERE / "wrong.py"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    found = re.findall(r"^(.+?):(\d+): error: (.*)$", output, re.MULTILINE)
    return [(Path(file).name, int(line), message) for file, line, message in found]


def pyright_errors(tmp_path: Path) -> list[tuple[str, int, str]]:
    config = {"typeCheckingMode": "strict", "include": [str(HERE)], "exclude": [str(HERE / "test_*.py")]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({**config, "extraPaths": [str(TREE)]}))
    command = [BIN / "basedpyright", "-p", tmp_path, "--pythonpath", sys.executable, "--outputjson"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return [
        (Path(item["file"]).name, item["range"]["start"]["line"] + 1, item["message"])
        for item in json.loads(output)["generalDiagnostics"]
        if item["severity"] == "error"
    ]


@pytest.mark.parametrize(("checker", "errors_of"), [("mypy", mypy_errors), ("pyright", pyright_errors)])
def test_checkers_accept_what_is_right_and_report_what_is_wrong(checker, errors_of, tmp_path):
    assert TREE.exists(), "run `make venv`"
    errors = errors_of(tmp_path)
    assert [error for error in errors if error[0] != "wrong.py"] == []
    reported = {line for _, line, _ in errors}
    assert sorted(marked_lines(checker) - reported) == [], "not reported"
    assert sorted(reported - marked_lines(checker)) == [], [error for error in errors if error[1] in reported]
