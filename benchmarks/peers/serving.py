"""The child's side of a comparison: an engine that takes requests on standard input and times its own work.

It runs in the interpreter of a peer, so it imports the standard library only. Requests and answers are JSON objects,
one a line. All engines are timed by the same lines of this file, around steps that each adapter knows how to take.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

Answer: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """What an engine is opened with.

    Attributes:
        model: A name, file or folder, in the form that the engine takes.
        threads: Of tensor operations.
        max_context: Most tokens of a sequence.
        max_sequences: Most sequences that run at once.
        dtype, weights: As in Treadle's `EngineConfig`; other engines have one precision, which they tell.
    """

    model: str
    threads: int
    max_context: int
    max_sequences: int
    dtype: str
    weights: str


class PeerEngine(Protocol):
    """What an adapter makes of an engine. Sampling is greedy, and nothing ends a sequence but its length.

    Attributes:
        version: Of the package.
        precision: Of weights and KV, in words.
    """

    version: str
    precision: str

    def begin(self, num_sequences: int, max_tokens: int, *, share_prefix: bool) -> None:
        """Leaves the last workload behind, and makes room for sequences that will have at most so many tokens each.

        `share_prefix` says whether they begin alike, for engines that are set up for one or the other.
        """
        ...

    def add(self, sequence: str, conversation: str, token_ids: list[int], new_tokens: int) -> None:
        """Adds a prompt. Its conversation is that of an ended sequence whose tokens it begins with, or a new one."""
        ...

    def step(self) -> Iterable[tuple[str, list[int]]]:
        """Computes until there are new tokens or a part of a prompt is done; the new tokens of each sequence."""
        ...

    def close(self) -> None:
        """Ends what runs beside the engine."""
        ...


def serve(open_engine: Callable[[Settings], PeerEngine]) -> None:
    """Answers requests until standard input ends. The first opens the engine, the others are workloads.

    Libraries print where they like: standard output is theirs no more, and goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine: PeerEngine | None = None
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        kind = request.pop("kind")
        if kind == "open":
            engine = open_engine(Settings(**request))
            answer: Answer = {"version": engine.version, "precision": engine.precision}
        else:
            assert engine is not None, "the first request opens the engine"
            answer = WORKLOADS[kind](engine, **request)
        print(json.dumps(answer), file=answers, flush=True)
    if engine is not None:
        engine.close()


def complete(engine: PeerEngine, prompts: list[list[int]], new_tokens: int) -> Answer:
    """Prompts that are there at once.

    `seconds` go from the first prompt to the last token. `decode_seconds` begin when the last sequence has its first
    token; `decode_tokens` are those generated in them.
    """
    engine.begin(len(prompts), max(map(len, prompts)) + new_tokens, share_prefix=False)
    counts: dict[str, int] = {}
    decode_began, tokens_before = 0.0, 0
    start = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add(f"sequence-{number}", f"conversation-{number}", prompt, new_tokens)
    while sum(counts.values()) < len(prompts) * new_tokens:
        for sequence, token_ids in engine.step():
            counts[sequence] = counts.get(sequence, 0) + len(token_ids)
        if not decode_began and len(counts) == len(prompts):
            decode_began, tokens_before = time.perf_counter(), sum(counts.values())
    end = time.perf_counter()
    tokens = sum(counts.values())
    decode = {"decode_seconds": end - decode_began, "decode_tokens": tokens - tokens_before}
    return {"seconds": end - start, "tokens": tokens, **decode}


def agents(engine: PeerEngine, prefix: list[int], results: list[list[list[int]]], new_tokens: int) -> Answer:
    """Agents that start together from one prefix; `results[agent][turn]` is what each reads before a turn.

    The prompt of a turn is all that the agent has read and written. `seconds` go from the first prompt to the end of
    the last agent.
    """
    num_turns = len(results[0])
    max_tokens = len(prefix) + sum(map(len, results[0])) + num_turns * new_tokens
    engine.begin(len(results), max_tokens, share_prefix=True)
    histories = [[*prefix, *result[0]] for result in results]
    running: dict[str, tuple[int, int]] = {}
    written: dict[str, int] = {}

    def take_turn(agent: int, turn: int) -> None:
        sequence = f"agent-{agent}-turn-{turn}"
        running[sequence], written[sequence] = (agent, turn), 0
        engine.add(sequence, f"agent-{agent}", list(histories[agent]), new_tokens)

    start = time.perf_counter()
    for agent in range(len(results)):
        take_turn(agent, 0)
    while running:
        for sequence, token_ids in engine.step():
            agent, turn = running[sequence]
            histories[agent] += token_ids
            written[sequence] += len(token_ids)
            if written[sequence] < new_tokens:
                continue
            del running[sequence]
            if turn + 1 < num_turns:
                histories[agent] += results[agent][turn + 1]
                take_turn(agent, turn + 1)
    return {"seconds": time.perf_counter() - start, "tokens": sum(written.values())}


WORKLOADS: dict[str, Callable[..., Answer]] = {"complete": complete, "agents": agents}
