"""`treadle models`, `treadle doctor`, and a start that loads no tensors."""

import json
import subprocess
import sys

import pytest

# Where nothing listens; pip is told not to try for long.
NO_INDEX = {
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "",
    "PIP_CONFIG_FILE": "/dev/null",
    "PIP_RETRIES": "0",
    "PIP_DEFAULT_TIMEOUT": "2",
}


def test_models_lists_names_and_what_else_works(treadle):
    done = treadle("models")
    assert done.returncode == 0
    assert done.stdout.splitlines()[1].split()[0] == "smollm2"
    assert ".gguf" in done.stdout and "random:SHAPE" in done.stdout and "\x1b" not in done.stdout


def test_models_on_a_terminal_is_a_table(terminal):
    session = terminal("models")
    session.expect("smollm2")
    assert session.exit_code() == 0


def test_models_as_json(treadle, tmp_path):
    done = treadle("models", "--json", env={"TREADLE_CACHE": str(tmp_path)})
    (model,) = json.loads(done.stdout)["models"]
    assert (model["name"], model["cached"]) == ("smollm2", False)


def test_pulling_what_is_cached_prints_its_path(treadle):
    done = treadle("models", "pull", "smollm2")
    assert done.returncode == 0 and done.stdout.strip().endswith(".gguf")
    assert done.stderr.splitlines() == ["treadle: smollm2: checking, 98 MB"]


@pytest.mark.parametrize("command", [("models", "pull", "smollm2"), ("chat", "smollm2")])
def test_a_pull_without_a_network_says_so(treadle, tmp_path, command):
    done = treadle(*command, stdin="hello\n", env={**NO_INDEX, "TREADLE_CACHE": str(tmp_path)})
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("treadle: error: pip could not download") and "Traceback" not in done.stderr


def test_doctor_tells_facts(treadle):
    done = treadle("doctor")
    assert done.returncode == 0, done.stdout
    titles = {line.split()[0] for line in done.stdout.splitlines() if not line.startswith(" ")}
    assert {"python", "packages", "cpu", "cores", "memory", "gpu", "torch", "dtype", "cache", "slow"} <= titles


def test_doctor_as_json_names_a_cache_that_cannot_be_written(treadle, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = treadle("doctor", "--json", env={"TREADLE_CACHE": str(tmp_path / "file" / "cache")})
    report = json.loads(done.stdout)
    assert done.returncode == 1 and not report["cache_writable"]
    assert "TREADLE_CACHE" in report["missing"][0]


@pytest.mark.parametrize("args", ["--help", "models", "chat --help"])
def test_these_start_without_torch(args):
    code = (
        "import sys\nfrom treadle.runtime.cli.main import main\n"
        f"try: main({args.split()!r})\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_no_command_is_a_usage_error(treadle):
    assert treadle().returncode == 2
