"""What the scheduler knows of a program and of a call."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from treadle.scheduler.commands import SamplingParams, Usage
from treadle.scheduler.graph import ProgramGraph
from treadle.scheduler.kv import Lease, Node
from treadle.scheduler.spread import Spread

USAGE_FIELDS = tuple(field.name for field in fields(Usage))


@dataclass(slots=True, eq=False)
class Tally:
    """A `Usage` while it grows."""

    cached: int = 0
    prefilled: int = 0
    re_prefilled: int = 0
    decoded: int = 0
    steps: int = 0
    queued_s: float = 0.0
    service_s: float = 0.0

    @classmethod
    def of(cls, usage: Usage) -> Tally:
        return cls(**{name: getattr(usage, name) for name in USAGE_FIELDS})

    def add(self, other: Tally) -> None:
        for name in USAGE_FIELDS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in USAGE_FIELDS}

    def usage(self) -> Usage:
        return Usage(**self.as_dict())


@dataclass(slots=True, eq=False)
class Program:
    """An open program: its live calls, the last that ended and may have left a tail, its leases, and the account.

    `service_s` is the attained service of all its calls so far, the live ones included. `tool` names what it waits for
    outside, as far as that was told. `path_s` is the service along the longest chain of calls that
    ended.
    """

    id: str
    kind: str
    tenant: str
    arrival: int
    graph: ProgramGraph
    calls: dict[str, Call] = field(default_factory=dict)
    num_calls: int = 0
    tails: dict[str, None] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)
    priority: int = 0
    due: float = 0.0
    service_s: float = 0.0
    path_s: float = 0.0
    tool: str = ""
    pinned: bool = False
    pauses: Spread = field(default_factory=Spread)
    tally: Tally = field(default_factory=Tally)


class Status(Enum):
    """Where a call is.

    A call is parked while it has nothing to compute: an open call until its prompt has grown by some pages, or a fork
    until its parent's prompt is computed.
    """

    PARKED = "parked"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Call:
    """A call and its place in memory.

    ::

        tokens      | prompt ............ | generated ..... | pending (sampled, not yet reported)
        position    0            num_computed_tokens   num_planned_tokens     num_tokens
        pages       | in the prefix tree, num_tree_pages | private, the last one perhaps not full |

    `num_computed_tokens` counts what completed steps computed, `num_planned_tokens` also what launched steps will
    have. Both fall to zero when the call loses its slot, and rise again to what the prefix tree still has. `epoch`
    counts the losses, so that the result of a step launched before one is not taken for progress after it.
    `num_sent_tokens` and `num_sent_pages` are what the engine knows of the slot; the rest is sent with the next row.
    `num_accounted_tokens` is how far the call ever came: below it, computing is computing again. `name` is that of its
    node, and `remaining_s` what the program is expected to take from its beginning on, along the graph.
    """

    id: str
    program: Program
    namespace: str
    arrival: int
    tokens: array[int]
    sampling: SamplingParams
    max_tokens: int | None
    open: bool
    fork_of: Call | None
    node_id: str | None
    name: str
    extends: str | None
    num_prompt_tokens: int
    waiting_since: float
    path_s: float
    remaining_s: float

    status: Status = Status.PARKED
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    node: Node | None = None
    num_tree_pages: int = 0
    num_computed_tokens: int = 0
    num_planned_tokens: int = 0
    num_pending: int = 0
    num_accounted_tokens: int = 0
    num_sent_tokens: int = 0
    num_sent_pages: int = 0
    epoch: int = 0
    wait_reason: str = ""
    forks: list[Call] = field(default_factory=list)
    stop_token_ids: frozenset[int] = frozenset()
    tally: Tally = field(default_factory=Tally)

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, those on the device that are not yet reported included."""
        return len(self.tokens) + self.num_pending

    @property
    def num_generated(self) -> int:
        """Generated tokens, those on the device that are not yet reported included."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens that no launched step computes. A finished generation's last token is never computed."""
        num_tokens = len(self.tokens) + self.num_pending
        if self.max_tokens is not None and num_tokens - self.num_prompt_tokens >= self.max_tokens and not self.open:
            return 0
        return num_tokens - self.num_planned_tokens

    @property
    def prompt_computed(self) -> bool:
        """The KV of all prompt tokens but the last is there: forks can share it."""
        return not self.open and self.num_computed_tokens >= self.num_prompt_tokens - 1

    def account_cached(self) -> None:
        """Counts what the prefix tree knew of the prompt."""
        self.tally.cached += max(0, min(self.num_computed_tokens, self.num_prompt_tokens) - self.num_accounted_tokens)
        self.num_accounted_tokens = max(self.num_computed_tokens, self.num_accounted_tokens)

    def account_computed(self, start: int, end: int, service_s: float) -> None:
        """Counts a row: tokens computed before are re-prefilled, generated ones were counted when they were sampled."""
        known = self.num_accounted_tokens
        self.tally.re_prefilled += max(0, min(end, known) - start)
        self.tally.prefilled += max(0, min(end, self.num_prompt_tokens) - max(start, known))
        self.num_accounted_tokens = max(end, known)
        self.tally.steps += 1
        self.tally.service_s += service_s
        self.program.service_s += service_s
