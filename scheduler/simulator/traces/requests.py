"""Traces of single requests: each is a program of one call."""

from __future__ import annotations

import calendar
import re
from collections.abc import Iterable

from treadle.scheduler.simulator.traces.files import Line, Record, TraceError
from treadle.scheduler.simulator.workload import Blocks, CallSpec, ProgramSpec

MOONCAKE_BLOCK_TOKENS = 512
AZURE_BLOCK_TOKENS = 16

_TIMESTAMP = re.compile(r"(\d{4})-(\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)(\.\d+)?")


def mooncake(lines: Iterable[Line], salt: str) -> tuple[ProgramSpec, ...]:
    """Requests of kvcache-ai/Mooncake (`FAST25-release/traces`): milliseconds, lengths, and blocks of 512 tokens.

    Block ids are shared by the whole file, and the last block of a prompt has one too. The trace does not say which
    requests are one conversation, so what a request generated is not tied to the prompt that goes on with it.
    """
    programs: list[ProgramSpec] = []
    for line in lines:
        record = Record.parse(line)
        prompt, prompt_tokens = Blocks.from_ids(record.integers("hash_ids")), record.integer("input_length")
        prompt_tokens = max(1, prompt_tokens)
        if len(prompt) * MOONCAKE_BLOCK_TOKENS < prompt_tokens:
            raise record.error("hash_ids", f"the blocks of {prompt_tokens} tokens")
        call = CallSpec("main", prompt, prompt_tokens, max(1, record.integer("output_length")))
        start_s = record.number("timestamp") / 1000
        programs.append(ProgramSpec(str(len(programs)), "mooncake", start_s, (call,), salt))
    return tuple(programs)


def azure(lines: Iterable[Line], name: str) -> tuple[ProgramSpec, ...]:
    """Requests of Azure/AzurePublicDataset (`AzureLLMInferenceTrace_*.csv`, 2023): times and lengths.

    Nothing is known of what prompts share, so they share nothing. The first request starts at 0.
    """
    rows: list[tuple[float, int, int]] = []
    for line in lines:
        cells = line.text.split(",")
        if len(cells) != 3 or not cells[1].isdecimal() or not cells[2].isdecimal():
            raise TraceError(f"{line.where}: expected TIMESTAMP,ContextTokens,GeneratedTokens")
        rows.append((_seconds(cells[0], line.where), max(1, int(cells[1])), max(1, int(cells[2]))))
    rows.sort()
    programs = []
    for number, (time_s, prompt_tokens, output_tokens) in enumerate(rows):
        prompt = Blocks(((0, -(-prompt_tokens // AZURE_BLOCK_TOKENS)),))
        call = CallSpec("main", prompt, prompt_tokens, output_tokens)
        programs.append(ProgramSpec(str(number), "azure", time_s - rows[0][0], (call,), f"{name}/{number}"))
    return tuple(programs)


def _seconds(timestamp: str, where: str) -> float:
    match = _TIMESTAMP.fullmatch(timestamp)
    if match is None:
        raise TraceError(f"{where}: {timestamp!r} is not a time like 2023-11-16 18:17:03.9799600")
    whole = calendar.timegm(tuple(int(part) for part in match.groups()[:6]))
    return whole + float(match[7] or 0)
