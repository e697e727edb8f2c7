"""What the scheduler knows of a program's graph: which nodes there are, what they need, and when they ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from treadle.scheduler.commands import DeclareNode, PathStep


@dataclass(slots=True, eq=False)
class GraphNode:
    """A declared node. A tool's `began` is when it was waited for; `ended` is when the node's value was there."""

    declared: DeclareNode
    began: float | None = None
    ended: float | None = None


class ProgramGraph:
    """The graph of one program. It grows while the program runs; a node is declared after its inputs."""

    def __init__(self, opened: float) -> None:
        self.opened = opened
        self.tool_wait_s = 0.0
        self._nodes: dict[str, GraphNode] = {}
        self._remaining_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._nodes

    def nodes(self) -> Iterator[DeclareNode]:
        """Every node, in the order of declaration."""
        return (node.declared for node in self._nodes.values())

    def outside(self, now: float) -> dict[str, float]:
        """The nodes that the program waits for outside the engine, and for how many seconds."""
        return {node_id: now - node.began for node_id, node in self._nodes.items() if node.began is not None}

    def report(self, now: float) -> list[dict[str, Any]]:
        """Every node with what was declared of it and the seconds since it began and ended, in values JSON knows."""
        return [
            {
                "id": node.declared.node_id,
                "kind": node.declared.kind,
                "name": node.declared.name,
                "inputs": list(node.declared.inputs),
                "extends": node.declared.extends,
                "group": node.declared.group,
                "began_ago_s": None if node.began is None else now - node.began,
                "ended_ago_s": None if node.ended is None else now - node.ended,
            }
            for node in self._nodes.values()
        ]

    def has_ended(self, node_id: str) -> bool:
        """Whether the node's value is there."""
        return self._nodes[node_id].ended is not None

    def declared(self, node_id: str) -> DeclareNode:
        """What is known of a node."""
        return self._nodes[node_id].declared

    def remaining_s(self, node_id: str, expected_s: Callable[[DeclareNode], float]) -> float:
        """Seconds of the longest chain that begins with a node: what remains of the critical path through it.

        What nodes are expected to take is looked up again when one is declared.
        """
        if not self._remaining_s:
            after = dict.fromkeys(self._nodes, 0.0)
            for later, node in reversed(self._nodes.items()):
                own_s = expected_s(node.declared) if node.ended is None else 0.0
                remaining = self._remaining_s[later] = after[later] + own_s
                for needed in node.declared.inputs:
                    after[needed] = max(after[needed], remaining)
        return self._remaining_s[node_id]

    def declare(self, command: DeclareNode) -> None:
        """Adds a node, or inputs to one that was declared before."""
        self._remaining_s.clear()
        known = self._nodes.get(command.node_id)
        if known is None:
            self._nodes[command.node_id] = GraphNode(command)
        else:
            inputs = dict.fromkeys((*known.declared.inputs, *command.inputs))
            known.declared = replace(known.declared, inputs=tuple(inputs))

    def began(self, node_id: str, now: float) -> None:
        """The program waits for a tool, a person, or anything outside."""
        self._nodes[node_id].began = now

    def ended(self, node_id: str, now: float) -> float | None:
        """A node's value is there. Returns the seconds for which the program waited for it, if it did."""
        node = self._nodes[node_id]
        node.ended = now
        if node.began is None:
            return None
        seconds, node.began = now - node.began, None
        self.tool_wait_s += seconds
        return seconds

    def critical_path(self) -> tuple[PathStep, ...]:
        """The chain of nodes that the end of the program waited for, first node first.

        Walking back from the node that ended last, each step is to the input that ended last; a node's seconds are
        those between that input's end, or the program's begin, and its own end.
        """
        done = {node_id: node.ended for node_id, node in self._nodes.items() if node.ended is not None}
        path: list[PathStep] = []
        current = max(done, key=done.__getitem__, default=None)
        while current is not None:
            declared = self._nodes[current].declared
            inputs = [node_id for node_id in declared.inputs if node_id in done]
            before = max(inputs, key=done.__getitem__, default=None)
            began = done[before] if before is not None else self.opened
            path.append(PathStep(current, declared.name, max(0.0, done[current] - began)))
            current = before
        return tuple(reversed(path))
