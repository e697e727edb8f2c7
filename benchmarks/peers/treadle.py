"""Treadle as an engine to compare: its engine's steps, without the text around them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from peers.serving import Settings, serve

from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.config import EngineConfig, torch_dtype
from treadle.runtime.loading import open_model
from treadle.runtime.models.load import open_checkpoint
from treadle.scheduler import CallFinished, Command, EndProgram, OpenProgram, SamplingParams, SubmitCall, TokensOut

GREEDY = SamplingParams(temperature=0)


class TreadleEngine:
    """Every conversation is a program, whose calls extend one another."""

    def __init__(self, settings: Settings) -> None:
        # Text is not compared, so no tokenizer is made of what the checkpoint holds, as none is by vLLM.
        path = Path(settings.model)
        checkpoint = open_checkpoint(path) if path.exists() else open_model(settings.model, pull=False)[0]
        max_context = min(settings.max_context, checkpoint.config.max_context)
        config = EngineConfig(
            dtype=settings.dtype,  # type: ignore[arg-type]
            weights=settings.weights,  # type: ignore[arg-type]
            num_threads=settings.threads,
            num_slots=settings.max_sequences,
            max_context=max_context,
        )
        self._engine = build_engine(checkpoint, None, config)
        dtype = str(torch_dtype(config.dtype)).removeprefix("torch.")
        self.version = version("treadle")
        self.precision = f"{dtype}, weights {settings.weights}"
        self._numbers = itertools.count()
        self._programs: dict[str, str] = {}
        self._last_calls: dict[str, str] = {}
        self._sequences: dict[str, str] = {}

    def begin(self, num_sequences: int, max_tokens: int, *, share_prefix: bool) -> None:
        self._apply(*(EndProgram(program) for program in self._programs.values()))
        # As the thread that turns an engine does between requests, so not before the first. Other engines write to all
        # KV when they start.
        while self._programs and self._engine.touch_ahead():
            pass
        self._programs.clear()
        self._last_calls.clear()
        self._sequences.clear()

    def add(self, sequence: str, conversation: str, token_ids: list[int], new_tokens: int) -> None:
        if conversation not in self._programs:
            self._programs[conversation] = f"program-{next(self._numbers)}"
            self._apply(OpenProgram(self._programs[conversation]))
        call, extends = f"call-{next(self._numbers)}", self._last_calls.get(conversation)
        self._last_calls[conversation], self._sequences[call] = call, sequence
        program = self._programs[conversation]
        self._apply(SubmitCall(call, program, tuple(token_ids), GREEDY, new_tokens, extends=extends))

    def step(self) -> Iterator[tuple[str, list[int]]]:
        events = self._engine.step()
        assert events is not None, "the engine has nothing to do"
        for event in events:
            assert not isinstance(event, CallFinished) or event.error is None, event
            if isinstance(event, TokensOut):
                yield self._sequences[event.call_id], list(event.token_ids)

    def close(self) -> None:
        self._engine.close()

    def _apply(self, *commands: Command) -> None:
        for event in self._engine.apply(commands):
            assert getattr(event, "error", None) is None, event


if __name__ == "__main__":
    serve(TreadleEngine)
