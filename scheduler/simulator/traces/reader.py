"""Reads any trace; its kind is seen from what is in it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from treadle.scheduler.simulator.traces import bfcl, claude_code, conversations, recorded, requests
from treadle.scheduler.simulator.traces.files import Line, Record, TraceError, decode, lines
from treadle.scheduler.simulator.traces.text import BLOCK_TOKENS as TEXT_BLOCK_TOKENS
from treadle.scheduler.simulator.workload import ProgramSpec, Workload

KINDS = (
    "Claude Code, Mooncake, LMCache agent, tau-bench, Continuum, BFCL multi-turn, Azure LLM and Treadle's own traces"
)


def read(path: Path) -> Workload:
    """Reads a trace: plain, gzip or xz.

    The workload is called what the file is called up to its first dot.

    Raises:
        TraceError: the file is not there, is of no known kind, or is damaged; the text names file and line.
    """
    name = path.name.partition(".")[0]
    rest = lines(path)
    first = next(rest, None)
    if first is None:
        raise TraceError(f"{path}: empty")
    try:
        block_tokens, programs = _programs(path, name, first, rest)
    except TraceError:
        raise
    except ValueError as error:
        raise TraceError(f"{path}: {error}") from error
    return Workload(name, block_tokens, programs)


def _programs(path: Path, name: str, first: Line, rest: Iterator[Line]) -> tuple[int, tuple[ProgramSpec, ...]]:
    if first.text == "TIMESTAMP,ContextTokens,GeneratedTokens":
        return requests.AZURE_BLOCK_TOKENS, requests.azure(rest, name)
    if first.text.startswith("client,window_start_s"):
        raise TraceError(f"{path}: arrival rates are no programs: read them with read_rates()")
    if first.text.startswith("["):
        return TEXT_BLOCK_TOKENS, _trajectories(path, name, first, rest)
    if first.text == "{":
        raise TraceError(
            f"{path}: one JSON object over several lines; a table of pauses is read with PauseTable.read()"
        )
    if not first.text.startswith("{"):
        raise _unknown(path)
    fields, everything = Record.parse(first).data.keys(), chain([first], rest)
    if {"recording", "program", "calls"} <= fields:
        return recorded.BLOCK_TOKENS, recorded.programs(everything)
    if {"requests", "block_size", "hash_id_scope"} <= fields:
        return claude_code.BLOCK_TOKENS, claude_code.programs(everything)
    if {"hash_ids", "input_length", "output_length"} <= fields:
        return requests.MOONCAKE_BLOCK_TOKENS, requests.mooncake(everything, name)
    if {"session_id", "input", "output"} <= fields:
        return TEXT_BLOCK_TOKENS, conversations.lmcache(everything, name)
    if {"id", "question", "involved_classes"} <= fields:
        return TEXT_BLOCK_TOKENS, bfcl.programs(everything, path, name)
    raise _unknown(path)


def _trajectories(path: Path, name: str, first: Line, rest: Iterator[Line]) -> tuple[ProgramSpec, ...]:
    """A file that is one list of objects."""
    text = "\n".join(line.text for line in chain([first], rest))
    items = decode(Line(str(path), text))
    records = [Record.of(f"{path}: item {number}", item) for number, item in enumerate(items)]
    if all("traj" in record.data for record in records):
        return conversations.tau_bench(records, name)
    if all("messages" in record.data for record in records):
        return conversations.continuum(records, name)
    raise _unknown(path)


def _unknown(path: Path) -> TraceError:
    return TraceError(f"{path}: no known trace; known are {KINDS}")
