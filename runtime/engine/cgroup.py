"""What the control groups around this process leave it of the machine: version 1, version 2, and both at once.

/proc/self/cgroup            where the process is                0::/a/b        4:memory:/a/b
/sys/fs/cgroup/...           the limits of that place,           a/b, a and the root: each may be the tightest;
                             and of those around it              in a container, only what is mounted there
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
UNLIMITED = 1 << 62
"""Version 1 has no word for no limit, but a number about as large as a file's largest offset."""


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes that the process may use; None if no control group says. `root` is where `proc` and `sys` are found."""
    limits = []
    for folder in _folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            (value,) = _numbers(folder / name, 1)
            if value is not None and value < UNLIMITED:
                limits.append(value)
    return min(limits, default=None)


def cpu_limit(root: Path = ROOT) -> float | None:
    """Cores whose time the process may use up; None if no control group says."""
    limits = []
    for folder in _folders(root, "cpu"):
        (quota, period), (old_quota,), (old_period,) = (
            _numbers(folder / "cpu.max", 2),
            _numbers(folder / "cpu.cfs_quota_us", 1),
            _numbers(folder / "cpu.cfs_period_us", 1),
        )
        for time, per in ((quota, period), (old_quota, old_period)):
            if time is not None and per is not None and time > 0 and per > 0:
                limits.append(time / per)
    return min(limits, default=None)


def usable_memory(root: Path = ROOT) -> int:
    """Bytes of memory that this process may use."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = memory_limit(root)
    return total if limit is None else min(total, limit)


def usable_cores(root: Path = ROOT) -> float:
    """Cores that this process may run on, or the share of them that its control group is given, if less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cpu_limit(root)
    return cores if limit is None else min(cores, limit)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders whose limits hold, as far as they are there: that of the process, and each one around it."""
    groups = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines() or ["0::/"]:
        _, controllers, place = line.split(":", 2)
        if not controllers:
            mounts = [groups, groups / "unified"]
        elif controller in controllers.split(","):
            mounts = [groups / controllers, groups / controller]
        else:
            continue
        inside = PurePosixPath("/", place).relative_to("/")
        for mount in mounts:
            yield from (mount / part for part in (inside, *inside.parents))


def _numbers(path: Path, count: int) -> list[int | None]:
    """The first words of a file as numbers; None for one that is missing or no number, such as `max`."""
    words = _text(path).split()[:count]
    return [int(word) if word.lstrip("-").isdigit() else None for word in words + [""] * (count - len(words))]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
