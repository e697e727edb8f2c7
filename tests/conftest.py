"""Tests run in several processes beside each other, the tests of a file in one of them, each with one thread.

Torch's threads spin while they wait for each other: with more of them than cores everything takes many times as long.
"""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

APART = ("kernels_compile", "kernels_interpret")
"""Folders whose tests run in one process more, all of them together."""


def pytest_collection_modifyitems(items):
    for item in items:
        folder = Path(item.path).parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder in APART else str(item.path)))
