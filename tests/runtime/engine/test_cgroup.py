"""Limits of control groups, as the kernel shows them, in folders of our own."""

from __future__ import annotations

import pytest

from treadle.runtime.engine.cgroup import cpu_limit, memory_limit, usable_cores, usable_memory
from treadle.runtime.engine.config import default_num_threads

GIB = 2**30
V1_NONE = "9223372036854771712\n"

MEMORY = {
    "no control groups": ({}, None),
    "version 2, no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, None),
    "version 2 at the root": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{GIB}\n"}, GIB),
    "no word of where we are": ({"sys/fs/cgroup/memory.max": f"{GIB}\n"}, GIB),
    "version 2, the process's own is the tightest": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/a/b/memory.max": f"{GIB}\n",
        },
        GIB,
    ),
    "version 2, one around it is the tightest": (
        {
            "proc/self/cgroup": "0::/a/b/c\n",
            "sys/fs/cgroup/a/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/b/c/memory.max": f"{3 * GIB}\n",
        },
        2 * GIB,
    ),
    "a neighbour's limit is not ours": (
        {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n", "sys/fs/cgroup/z/memory.max": "4096\n"},
        None,
    ),
    "a container that sees only its own": (
        {"proc/self/cgroup": "0::/docker/0123\n", "sys/fs/cgroup/memory.max": f"{GIB}\n"},
        GIB,
    ),
    "version 1, nested": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/a/b\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_NONE,
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": V1_NONE,
        },
        2 * GIB,
    ),
    "version 1 without a limit": (
        {"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_NONE},
        None,
    ),
    "both versions": (
        {
            "proc/self/cgroup": "4:memory:/a\n0::/b\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/unified/b/memory.max": f"{GIB}\n",
        },
        GIB,
    ),
    "a place with colons": ({"proc/self/cgroup": "0::/a:b\n", "sys/fs/cgroup/a:b/memory.max": f"{GIB}\n"}, GIB),
    "nonsense": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "a lot\n"}, None),
}

CPU = {
    "no control groups": ({}, None),
    "version 2, no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    "version 2, nested": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
        },
        1.5,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/a\n2:cpuset:/\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
        },
        0.5,
    ),
    "version 1 under the controller's own name, no limit in it": (
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/a\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
        },
        3.0,
    ),
}


def a_root(tmp_path, files):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(("files", "limit"), MEMORY.values(), ids=MEMORY)
def test_the_tightest_memory_limit_around_the_process_holds(tmp_path, files, limit):
    assert memory_limit(a_root(tmp_path, files)) == limit


@pytest.mark.parametrize(("files", "limit"), CPU.values(), ids=CPU)
def test_the_tightest_share_of_cores_around_the_process_holds(tmp_path, files, limit):
    assert cpu_limit(a_root(tmp_path, files)) == limit


def test_a_limit_above_what_the_machine_has_changes_nothing(tmp_path):
    unlimited = a_root(tmp_path / "none", {"proc/self/cgroup": "0::/\n"})
    large = a_root(
        tmp_path / "large",
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{2**60}\n",
            "sys/fs/cgroup/cpu.max": "100000000 1000\n",
        },
    )
    assert usable_memory(large) == usable_memory(unlimited)
    assert usable_cores(large) == usable_cores(unlimited) >= 1


@pytest.mark.parametrize(
    ("wanted", "cores", "threads"), [(8, 8.0, 8), (8, 2.5, 2), (2, 8.0, 2), (8, 0.5, 1), (1, 4.0, 1)]
)
def test_threads_are_not_more_than_the_cores_they_may_use_up(wanted, cores, threads):
    assert default_num_threads(wanted, cores) == threads
