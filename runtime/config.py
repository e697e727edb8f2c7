"""What Treadle takes from the environment. Outside `runtime/cli`, no other file reads it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path


def cache_dir() -> Path:
    """Where downloaded models are kept: `$TREADLE_CACHE`, or `treadle` in `$XDG_CACHE_HOME`, or `~/.cache/treadle`."""
    if chosen := os.environ.get("TREADLE_CACHE"):
        return Path(chosen).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    base = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
    return base / "treadle"


def c_compiler() -> str | None:
    """The C compiler, with its arguments: `$CC`, or the first there is of `cc`, `gcc` and `clang`."""
    return os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)


def child_environment(extra: Mapping[str, str], defaults: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child process: ours, with `extra` set, and `defaults` where ours has nothing."""
    return {**defaults, **os.environ, **extra}
