"""Engines on random-weight models, turned by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.engine.engine import Engine
from treadle.runtime.models import SHAPES, RandomCheckpoint
from treadle.scheduler import (
    CallFinished,
    Command,
    Event,
    OpenProgram,
    ProgramEnded,
    Rejected,
    SamplingParams,
    SubmitCall,
    TokenLogprob,
    TokensOut,
)

GREEDY = SamplingParams(temperature=0.0, logprobs=2)
TIE = 1e-3
"""Two logits closer than this may be told apart differently by sums in another order."""


@lru_cache(maxsize=8)
def checkpoint(shape: str) -> RandomCheckpoint:
    return RandomCheckpoint(SHAPES[shape])


@dataclass
class Outcome:
    """What a call produced."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    end: CallFinished | None = None

    def gap(self, index: int) -> float:
        """How far apart the two best logits of a position were."""
        (_, best), (_, second) = self.logprobs[index].top[:2]
        return best - second


class Bench:
    """An engine with one open program, and everything that came out of it."""

    def __init__(
        self,
        shape: str = "tiny-llama",
        *,
        engine: Engine | None = None,
        clock: Callable[[], float] = time.perf_counter,
        **config: object,
    ) -> None:
        settings = {"dtype": "float32", "num_pages": 256, "page_size": 4, **config}
        self.engine = engine or build_engine(checkpoint(shape), None, EngineConfig(**settings), clock)
        self.calls: dict[str, Outcome] = {}
        self.rejected: list[Rejected] = []
        self.ended: list[ProgramEnded] = []
        self.send(OpenProgram("program"))

    @property
    def scheduler(self):
        return self.engine.scheduler

    def send(self, *commands: Command) -> None:
        self._record(self.engine.apply(commands))

    def submit(
        self,
        call_id: str,
        prompt: Sequence[int],
        params: SamplingParams = GREEDY,
        program: str = "program",
        **options: object,
    ) -> None:
        self.calls[call_id] = Outcome()
        self.send(SubmitCall(call_id, program, tuple(prompt), params, **options))

    def step(self) -> bool:
        events = self.engine.step()
        self._record(events or [])
        self.scheduler.check_integrity()
        return events is not None

    def run(self) -> dict[str, Outcome]:
        while self.step():
            pass
        return self.calls

    def page_bytes(self) -> dict[tuple[str, bytes], bytes]:
        """The KV of every full page in the tree, by its tier and all tokens up to its end."""
        state, size = self.engine.runner.state, self.engine.runner.state.page_size
        found = {}
        for node in self.scheduler.memory.tree.nodes():
            if node.owner is not None:
                continue
            path, parent = node.key, node.parent
            while parent is not None:
                path, parent = parent.key + path, parent.parent
            above = len(path) - len(node.key)
            for tier, arena, places in (("device", state.kv, node.pages), ("host", state.host_kv, node.copies)):
                for index, place in enumerate(places):
                    tokens = path[: above + (index + 1) * size].tobytes()
                    found[tier, tokens] = arena[:, :, place].numpy().tobytes()
        return found

    def assert_nothing_leaks(self) -> None:
        """Every page can be had, every slot is free, nothing is locked or deferred."""
        memory = self.scheduler.memory
        assert self.scheduler.num_running == self.scheduler.num_waiting == self.scheduler.num_in_flight == 0
        assert memory.num_available == memory.pool.num_pages
        assert all(root.lock_count == 0 for root in memory.tree.roots())
        self.scheduler.check_integrity()

    def _record(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, TokensOut):
                outcome = self.calls[event.call_id]
                assert outcome.end is None, "tokens after the end"
                outcome.token_ids += event.token_ids
                outcome.logprobs += event.logprobs
                outcome.text += event.text
            elif isinstance(event, CallFinished):
                outcome = self.calls[event.call_id]
                assert outcome.end is None, "ended twice"
                outcome.end = event
                outcome.text += event.text
            elif isinstance(event, Rejected):
                self.rejected.append(event)
            else:
                self.ended.append(event)


def assert_same(expected: Outcome, actual: Outcome) -> int:
    """Asserts equal tokens, up to a position where the two best were nearly tied. Returns 1 if there was one."""
    assert len(expected.token_ids) == len(actual.token_ids)
    for index, (left, right) in enumerate(zip(expected.token_ids, actual.token_ids, strict=True)):
        if left != right:
            assert expected.gap(index) < TIE, f"position {index}: {left} != {right}, gap {expected.gap(index)}"
            return 1
    return 0


def with_seed(seed: int, **options: object) -> SamplingParams:
    return replace(SamplingParams(seed=seed), **options)
