"""From a model's name to its weights and tokenizer, in a thread that can be told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from treadle.runtime.config import cache_dir
from treadle.runtime.errors import ModelNotFoundError
from treadle.runtime.models.registry import installed, pull, resolve
from treadle.runtime.threads import run_in_daemon

if TYPE_CHECKING:
    import torch

    from treadle.kernels.codes import Int4Matrix, Int8Matrix
    from treadle.runtime.models.checkpoint import Checkpoint
    from treadle.runtime.text.tokenizer import Tokenizer

T = TypeVar("T")
Check: TypeAlias = Callable[..., None]
"""Raises if nobody wants the model any more. Called between tensors, and between pieces of a download."""

GRACE_S = 5.0
"""How long a load that was told to stop may take to do so. Only a stalled network takes so long, and it is let go."""


def open_model(model: str, *, pull: bool) -> tuple[Checkpoint, Tokenizer | None]:
    """Checkpoint and tokenizer of a model by name, path or `random:SHAPE`."""
    from treadle.runtime.models.load import open_checkpoint
    from treadle.runtime.models.random_weights import SHAPES, RandomCheckpoint

    kind, _, shape = model.partition(":")
    if kind == "random":
        if shape not in SHAPES:
            raise ModelNotFoundError(f"no shape is called {shape!r}; choose one of {', '.join(SHAPES)}")
        return RandomCheckpoint(SHAPES[shape]), None
    from treadle.runtime.text.tokenizer import load_tokenizer

    path = resolve(model, cache_dir(), pull=pull)
    return open_checkpoint(path), load_tokenizer(path)


def fetch_if_missing(model: str, check: Check) -> None:
    """Downloads a known model that is not in the cache."""
    if any(listed.name == model and not listed.cached for listed in installed(cache_dir())):
        pull(model, cache_dir(), check)


class StoppableCheckpoint:
    """A checkpoint that stops where it is told to: `check` is called before each tensor."""

    def __init__(self, checkpoint: Checkpoint, check: Check) -> None:
        self.path = checkpoint.path
        self.config = checkpoint.config
        self._checkpoint = checkpoint
        self._check = check

    def names(self) -> Collection[str]:
        return self._checkpoint.names()

    def tensor(self, name: str) -> torch.Tensor:
        self._check()
        return self._checkpoint.tensor(name)

    def codes(self, name: str) -> Int4Matrix | Int8Matrix | None:
        self._check()
        return self._checkpoint.codes(name)


async def load_in_thread(load: Callable[[Check], T], close: Callable[[T], object]) -> T:
    """What `load` makes, beside the event loop. Cancelling works at once, and leaves nothing behind.

    A cancelled load is told to stop and waited for, because a thread that is inside of torch when the process ends
    takes the process down with it. What it made after all is given to `close`.
    """
    abandoned = threading.Event()
    ended = asyncio.Event()

    def check(*_: object) -> None:
        if abandoned.is_set():
            raise InterruptedError("nobody waits for this model any more")

    try:
        return await run_in_daemon(lambda: load(check), "treadle-load", ended=ended.set, unwanted=close)
    except asyncio.CancelledError:
        abandoned.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), GRACE_S)
        raise
