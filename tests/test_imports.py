"""The rooms may depend on each other in one direction only: runtime on the others, the others on nothing of ours."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "dsl": {"dsl"},
    "scheduler": {"scheduler"},
    "kernels": {"kernels"},
    "grammar": {"grammar"},
    "runtime": {"runtime", "dsl", "scheduler", "kernels", "grammar"},
}
PURE_FORBIDDEN = {"torch", "numpy", "asyncio", "threading", "time", "datetime"}


def imported_modules(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; imports are absolute here"
            modules.append(node.module or "")
    return modules


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ALLOWED)
def test_room_imports_only_what_its_direction_allows(room):
    for path in sources(room):
        for module in imported_modules(path):
            top, _, rest = module.partition(".")
            assert top not in ALLOWED, f"{path} imports {module}: write treadle.{module}"
            if top == "treadle":
                target = rest.partition(".")[0]
                assert target in ALLOWED[room], f"{path} imports {module}: {room} may not depend on {target}"


def test_scheduler_is_pure():
    for path in sources("scheduler"):
        for module in imported_modules(path):
            assert module.partition(".")[0] not in PURE_FORBIDDEN, f"{path} imports {module}"


@pytest.mark.parametrize("room", ALLOWED)
def test_init_files_hold_only_re_exports(room):
    for path in sources(room):
        if path.name == "__init__.py":
            for node in ast.parse(path.read_text()).body:
                is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
                assert isinstance(node, ast.ImportFrom) or is_docstring or is_all, f"{path}:{node.lineno}"


def test_kernels_init_is_empty():
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""


def test_importing_the_runtime_does_not_import_torch():
    code = "import sys, treadle.runtime, treadle.runtime.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
