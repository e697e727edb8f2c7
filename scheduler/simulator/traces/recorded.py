"""Recordings of a live engine, as `treadle run --record` and `local(record=...)` make them: programs, one a line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast, get_args

from treadle.scheduler.simulator.traces.files import Line, Record, TraceError
from treadle.scheduler.simulator.workload import (
    NUM_BLOCK_IDS,
    Blocks,
    CallSpec,
    PauseKind,
    ProgramSpec,
    close_prompts,
)

BLOCK_TOKENS = 16


def programs(lines: Iterable[Line]) -> tuple[ProgramSpec, ...]:
    """Programs of one recording, or of several in one file: those of one share blocks, and each recording begins at 0.

    Full blocks of 16 tokens are recorded, and numbered from 0; the last block of a prompt gets a number from the other
    end. Programs are named by the number of their line, from 0, and the id that they had.
    """
    found: list[ProgramSpec] = []
    fresh_id = NUM_BLOCK_IDS
    for line in lines:
        record = Record.parse(line)
        try:
            calls = [_call(call) for call in record.records("calls")]
            fresh_id -= len(calls)
            found.append(_program(record, len(found), close_prompts(calls, BLOCK_TOKENS, fresh_id)))
        except TraceError:
            raise
        except ValueError as error:
            raise TraceError(f"{record.where}: {error}") from error
    return tuple(found)


def _program(record: Record, number: int, calls: tuple[CallSpec, ...]) -> ProgramSpec:
    if record.integer("block_tokens") != BLOCK_TOKENS:
        raise record.error("block_tokens", str(BLOCK_TOKENS))
    if not calls:
        raise TraceError(f"{record.where}: a program without calls")
    name, kind = f"{number}/{record.text('program')}", record.text("kind")
    return ProgramSpec(name, kind, record.number("start_s"), calls, record.text("recording"))


def _call(record: Record) -> CallSpec:
    pause_kind = record.text("pause_kind")
    if pause_kind not in get_args(PauseKind):
        raise record.error("pause_kind", f"one of {', '.join(get_args(PauseKind))}")
    return CallSpec(
        stream=str(record.integer("stream")),
        prompt=Blocks.from_runs(record.runs("blocks")),
        prompt_tokens=record.integer("prompt_tokens"),
        output_tokens=record.integer("output_tokens"),
        pause_s=record.number("pause_s"),
        pause_kind=cast(PauseKind, pause_kind),
        tool=record.text("tool"),
        after=tuple(record.integers("after")),
        foreseen=record.data.get("foreseen") is True,
    )
