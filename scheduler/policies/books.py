"""What policies may look at: everything the scheduler knows, by one name each."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from treadle.scheduler.call import Call, Program
from treadle.scheduler.commands import DeclareNode
from treadle.scheduler.config import Costs, SchedulerConfig
from treadle.scheduler.kv import Lease
from treadle.scheduler.spread import Spreads

if TYPE_CHECKING:
    from treadle.scheduler.memory import CallMemory
    from treadle.scheduler.roster import Roster


FIRST_GUESS_S = 1e-4
FIRST_STEP_S = 0.02
LOAD_SHARE = 0.05
MANY_TOKENS = 32
PRIOR = 4
"""How many pauses of a program's own count as much as what is known of its kind."""


@dataclass(slots=True)
class Foresight:
    """What only a simulation can know: when a program will come back (a time), how many tokens a call will generate."""

    returns: Callable[[Lease], float]
    output_tokens: Callable[[Call], int]


@dataclass(slots=True)
class Books:
    """The state that decisions are made from.

    Attributes:
        pauses: Seconds between a turn's end and the next turn, by kind of program and what it waited for.
        outputs: Tokens that calls generate, by kind of program and name of the node.
        durations: Seconds that a program waits for a node outside the engine, by the same.
        step_s: What a step takes, the mean of the last ones.
        turns: Calls that ended programs had.
        queued: Seconds that calls waited whose program had lost its pages.
        hits: Known and all tokens of the prompts of the last calls that started.
        costs: What computing and loading cost; a load is taken to cost `LOAD_SHARE` of computing unless that is given.
        foresight: Takes the place of `pauses` and `outputs` where it is given.
    """

    config: SchedulerConfig
    programs: Mapping[str, Program]
    pauses: Spreads = field(default_factory=Spreads)
    outputs: Spreads = field(default_factory=Spreads)
    durations: Spreads = field(default_factory=Spreads)
    step_s: float = FIRST_STEP_S
    turns: deque[int] = field(default_factory=lambda: deque(maxlen=256))
    queued: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    hits: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=64))
    foresight: Foresight | None = None
    costs: Costs = field(init=False)
    memory: CallMemory = field(init=False)
    roster: Roster = field(init=False)
    leases: dict[str, Lease] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.costs = self.config.costs or Costs(FIRST_GUESS_S, 0.0, FIRST_GUESS_S * LOAD_SHARE)

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """Learns from a step what steps take, and, unless that was given, what a token costs where there are many."""
        self.step_s += (seconds - self.step_s) / 16
        if self.config.costs is None and num_tokens >= MANY_TOKENS:
            per_token = self.costs.per_token + (seconds / num_tokens - self.costs.per_token) / 16
            self.costs = Costs(per_token, 0.0, per_token * LOAD_SHARE)

    def expected_pause(self, lease: Lease, now: float) -> float:
        """Seconds until the owner of a lease is expected to want its pages. What a hint says outweighs the rest."""
        if lease.pause is None or now < lease.retained_until:
            return 0.0
        if lease.is_demoted:
            return math.inf
        if self.foresight is not None:
            return max(0.0, self.foresight.returns(lease) - now)
        elapsed, own = now - lease.since, self.programs[lease.program_id].pauses
        pooled = self.pauses.of(lease.pause).remaining(elapsed)
        return (own.count * own.remaining(elapsed) + PRIOR * pooled) / (own.count + PRIOR)

    def expected_output(self, call: Call) -> float:
        """Tokens that a call is expected to generate from now on."""
        if self.foresight is not None:
            return max(0, self.foresight.output_tokens(call) - call.num_generated)
        return self.outputs.of((call.program.kind, call.name)).remaining(call.num_generated)

    def expected_node_s(self, kind: str, node: DeclareNode) -> float:
        """Seconds that a node of a kind of program is expected to take once its inputs are there."""
        if node.kind == "llm":
            return self.step_s * max(1.0, self.outputs.of((kind, node.name)).mean())
        return self.durations.of((kind, node.name)).mean() if node.kind == "tool" else 0.0
