"""The graph of a program, as people and other programs read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import networkx

    from treadle.dsl.node import Node
    from treadle.dsl.program import Program

_SHAPES = {"llm": ("[", "]"), "tool": ("[[", "]]"), "gather": ("((", "))")}


class Graph:
    """Calls and tools, and what flows between them. It grows while the program runs.

    ::

        async with program("report") as p:
            ...
        print(p.graph.mermaid())

    Attributes:
        dag: The `networkx.DiGraph`: each key is an id, with the `Node` under `"node"`; each edge has a `"kind"`:
            `value` (an input), `extends` (the conversation goes on) or `calls` (a model's turn called a tool).
    """

    def __init__(self, name: str) -> None:
        import networkx

        self.name = name
        self.dag: networkx.DiGraph[str] = networkx.DiGraph()
        self._root: Program | None = None

    def add(self, node: Node) -> None:
        """Adds a node with its edges, as it is declared."""
        self.dag.add_node(self._key(node), node=node)
        for source in node.inputs:
            self.connect(source, node)
        if node.caller is not None:
            self.connect(node.caller, node, "calls")

    def connect(self, source: Node, target: Node, kind: str = "value") -> None:
        """Adds an edge; a node of another program comes in with it."""
        if target.extends is source:
            kind = "extends"
        self.dag.add_node(self._key(source), node=source)
        self.dag.add_edge(self._key(source), self._key(target), kind=kind)

    def nodes(self) -> list[Node]:
        """The nodes in the order in which they came in."""
        return [data["node"] for _, data in self.dag.nodes(data=True)]

    def mermaid(self) -> str:
        """The graph in Mermaid's language, for a Markdown page or mermaid.live."""
        short = {key: f"v{index}" for index, key in enumerate(self.dag)}
        lines = ["flowchart TD"]
        for key, data in self.dag.nodes(data=True):
            node: Node = data["node"]
            left, right = _SHAPES.get(node.kind, ("[", "]"))
            label = node.name if node.sample is None else f"{node.name} {node.sample}"
            lines.append(f'    {short[key]}{left}"{_escape(label)}"{right}')
        for source, target, data in self.dag.edges(data=True):
            kind = data["kind"]
            arrow = "-.->" if kind == "calls" else "==>" if kind == "extends" else "-->"
            lines.append(f"    {short[source]} {arrow} {short[target]}")
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """The graph as plain values. Times are seconds since the first node was declared."""
        nodes = [(key, data["node"]) for key, data in self.dag.nodes(data=True)]
        start = min((node.declared_at for _, node in nodes), default=0.0)
        return {
            "name": self.name,
            "nodes": [_node_json(key, node, start) for key, node in nodes],
            "edges": [
                {"source": source, "target": target, "kind": data["kind"]}
                for source, target, data in self.dag.edges(data=True)
            ],
        }

    def _key(self, node: Node) -> str:
        if self._root is None:
            self._root = node.program.root
        return node.id if node.program.root is self._root else f"{node.program.root.id}/{node.id}"


def _node_json(key: str, node: Node, start: float) -> dict[str, Any]:
    def since(moment: float | None) -> float | None:
        return None if moment is None else round(moment - start, 6)

    return {
        "id": key,
        "kind": node.kind,
        "name": node.name,
        "state": node.state,
        "program": node.program.id,
        "group": node.group,
        "sample": node.sample,
        "location": str(node.location),
        "declared_s": since(node.declared_at),
        "started_s": since(node.started_at),
        "finished_s": since(node.finished_at),
        "error": None if node.error is None else f"{type(node.error).__name__}: {node.error}",
    }


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
