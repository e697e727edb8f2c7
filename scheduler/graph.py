"""What the scheduler knows of a program's graph: which nodes there are, what they need, and when they ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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
        self._heights: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._nodes

    def nodes(self) -> Iterator[DeclareNode]:
        """Every node, in the order of declaration."""
        return (node.declared for node in self._nodes.values())

    def declared(self, node_id: str) -> DeclareNode:
        """What is known of a node."""
        return self._nodes[node_id].declared

    def height(self, node_id: str) -> int:
        """Nodes on the longest chain of those that wait for this one: what remains of the critical path after it."""
        if not self._heights:
            self._heights = dict.fromkeys(self._nodes, 0)
            for later, node in reversed(self._nodes.items()):
                for needed in node.declared.inputs:
                    self._heights[needed] = max(self._heights[needed], self._heights[later] + 1)
        return self._heights[node_id]

    def declare(self, command: DeclareNode) -> None:
        """Adds a node, or inputs to one that was declared before."""
        self._heights.clear()
        known = self._nodes.get(command.node_id)
        if known is None:
            self._nodes[command.node_id] = GraphNode(command)
        else:
            inputs = dict.fromkeys((*known.declared.inputs, *command.inputs))
            known.declared = replace(known.declared, inputs=tuple(inputs))

    def began(self, node_id: str, now: float) -> None:
        """The program waits for a tool, a person, or anything outside."""
        self._nodes[node_id].began = now

    def ended(self, node_id: str, now: float) -> None:
        """A node's value is there."""
        node = self._nodes[node_id]
        if node.began is not None:
            self.tool_wait_s += now - node.began
            node.began = None
        node.ended = now

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
