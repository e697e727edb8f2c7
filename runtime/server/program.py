"""A live program as the server knows it: its graph, where its conversations ended, and what it waits for."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from treadle.runtime.executor.account import Account
from treadle.runtime.server.conversations import Digest
from treadle.runtime.server.tenants import Tenant

NodeKind: TypeAlias = Literal["llm", "tool", "person"]
NodeState: TypeAlias = Literal["running", "done", "failed"]
ProgramState: TypeAlias = Literal["running", "tool", "person", "idle", "ended"]


@dataclass(slots=True, eq=False)
class ProgramNode:
    """A turn of the model, a run of a tool, or a wait for a person. Times are of the clock of the registry.

    Attributes:
        call_id: Of a tool: the id under which the model called it, and its result comes back.
    """

    id: str
    kind: NodeKind
    name: str
    inputs: tuple[str, ...]
    began: float
    extends: str | None = None
    call_id: str | None = None
    ended: float | None = None
    state: NodeState = "running"


@dataclass(slots=True, eq=False)
class End:
    """Where a conversation ended: an answer of a turn, what it waits for, and the call that a next turn extends."""

    node_id: str | None
    call_id: str
    waits: list[ProgramNode] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class TurnNode:
    """A turn that runs.

    Attributes:
        node_id: Of the declared node; None if the program has no room for more nodes: then calls name none.
        extends: The call whose tokens the prompt begins with, if the conversation goes on.
        so_far: Digest of its messages; None for a prompt, which is no conversation that may go on.
        is_final: The client said that no request will follow.
    """

    program: LiveProgram
    node_id: str | None
    extends: str | None
    so_far: Digest | None
    is_final: bool
    is_over: bool = False


@dataclass(slots=True, eq=False)
class LiveProgram:
    """A program of a tenant.

    Attributes:
        id: In the scheduler: unlike any other, of any tenant, at any time.
        public_id: By which its tenant knows it.
        source: What named it, see `identity`; "api" if it was opened by POST /v1/programs.
        opened: When, by the registry's clock; `created_at` is the same in seconds since 1970.
        nodes: The graph, in the order in which it grew.
        ends: Where its conversations ended, by their digests, the latest last.
        tools: Its tools that run, by the id of their call.
        step: What the client called the part that it is in.
        num_active: Turns that run now.
        seen_events: Ids of the last events that clients sent.
        over_tools: Ids of the last calls of tools that have ended.
        is_final: A turn that has ended was said to be the last.
        keep_until: Before then it does not end for being idle.
        account: What it used, once it has ended.
    """

    id: str
    public_id: str
    tenant: Tenant
    source: str
    kind: str
    parent: str | None
    priority: int
    due_s: float
    opened: float
    created_at: float
    last_used: float
    nodes: dict[str, ProgramNode] = field(default_factory=dict)
    ends: OrderedDict[Digest, End] = field(default_factory=OrderedDict)
    tools: dict[str, ProgramNode] = field(default_factory=dict)
    step: str | None = None
    num_active: int = 0
    num_turns: int = 0
    seen_events: OrderedDict[str, None] = field(default_factory=OrderedDict)
    over_tools: OrderedDict[str, None] = field(default_factory=OrderedDict)
    is_final: bool = False
    keep_until: float = -math.inf
    ended: float | None = None
    end_reason: str = ""
    account: Account | None = None

    @property
    def state(self) -> ProgramState:
        """What it does now."""
        if self.ended is not None:
            return "ended"
        if self.num_active:
            return "running"
        if self.tools:
            return "tool"
        return "person" if self.num_turns else "idle"

    def to_json(self, now: float) -> dict[str, Any]:
        """What its tenant is told of it in a list."""
        return {
            "id": self.public_id,
            "object": "program",
            "state": self.state,
            "source": self.source,
            "kind": self.kind,
            "parent": self.parent,
            "step": self.step,
            "priority": self.priority,
            "created_at": round(self.created_at, 3),
            "age_s": round((self.ended if self.ended is not None else now) - self.opened, 3),
            "idle_s": 0.0 if self.num_active or self.ended is not None else round(now - self.last_used, 3),
            "turns": self.num_turns,
            "nodes": len(self.nodes),
            "waits_for": [
                {"tool": node.name, "call_id": node.call_id, "seconds": round(now - node.began, 3)}
                for node in self.tools.values()
            ],
            "end_reason": self.end_reason or None,
        }
