"""The tests of the official client once more, with openai 2.x: it speaks HTTP through another library."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WANTED = ["openai>=2,<3", "pytest>=8.4,<10", "pytest-asyncio>=1.1,<2", "jsonschema>=4.23,<5"]
INSTALL_S = 300
TEST_S = 500


@pytest.fixture(scope="session")
def old_python(request) -> Path:
    """The interpreter of an environment with openai 2.x, made once and kept in pytest's cache."""
    folder = request.config.cache.mkdir("openai2") / f"python{sys.version_info.major}.{sys.version_info.minor}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists() and ready.read_text() == str(WANTED):
        return python
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *WANTED]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    if done.returncode and re.search(r"NewConnectionError|ConnectTimeout|ProxyError|NameResolution", done.stderr):
        pytest.skip(f"openai 2.x cannot be installed, for no package index can be reached: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    ready.write_text(str(WANTED))
    return python


@pytest.mark.parametrize("name", ["test_openai.py", "test_responses.py"])
def test_openai_2_passes_the_tests_of_openai_3(old_python, smollm2_url, exact_smollm2_url, tmp_path, name):
    (tmp_path / name).write_text((HERE / name).read_text())
    (tmp_path / "conftest.py").write_text(
        "import os, pytest\n\n\n"
        "@pytest.fixture(scope='session')\n"
        "def smollm2_url():\n"
        "    return os.environ['TREADLE_TEST_URL']\n\n\n"
        "@pytest.fixture(scope='session')\n"
        "def exact_smollm2_url():\n"
        "    return os.environ['TREADLE_TEST_EXACT_URL']\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    done = subprocess.run(
        [str(old_python), "-m", "pytest", "-q", "-p", "no:cacheprovider", name],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "TREADLE_TEST_URL": smollm2_url,
            "TREADLE_TEST_EXACT_URL": exact_smollm2_url,
        },
        capture_output=True,
        text=True,
        timeout=TEST_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
