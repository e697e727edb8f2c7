"""A program's graph for people and other programs: as JSON, in Mermaid's language, and drawn as SVG."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

import networkx

from treadle.runtime.server.program import LiveProgram, NodeKind, ProgramNode

MOST_DRAWN = 200
"""Nodes of a drawing: the last ones. Mermaid gives up at about as many, and nobody can read more."""
MOST_LABEL = 24

_SHAPES: Mapping[NodeKind, tuple[str, str]] = {"llm": ("[", "]"), "tool": ("[[", "]]"), "person": ("([", "])")}
_ARROWS = {"extends": "==>", "calls": "-.->", "value": "-->"}
_COLOURS = {"llm": "#dbe9fb", "tool": "#fdecc8", "person": "#e6e6ea"}
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 172, 44, 24, 40, 16


def to_json(program: LiveProgram, now: float) -> dict[str, Any]:
    """All nodes and edges. Times are seconds since the program was opened."""
    edges = [{"source": source, "target": target, "kind": kind} for source, target, kind in _edges(program)]
    return {
        "id": program.public_id,
        "state": program.state,
        "age_s": round((program.ended if program.ended is not None else now) - program.opened, 6),
        "nodes": [_node(program, node) for node in program.nodes.values()],
        "edges": edges,
    }


def to_mermaid(program: LiveProgram, now: float) -> str:
    """The last nodes as a flowchart for a Markdown page or mermaid.live. Solid arrows are values, thick ones
    conversations that go on, dotted ones calls of tools."""
    shown = _last(program)
    lines = ["flowchart TD"]
    for node in shown.values():
        left, right = _SHAPES[node.kind]
        lines.append(f'    {_key(node)}{left}"{_escaped(f"{_label(node)} {_time(program, node, now)}")}"{right}')
    for source, target, kind in _edges(program):
        if source in shown and target in shown:
            lines.append(f"    {_key(shown[source])} {_ARROWS[kind]} {_key(shown[target])}")
    return "\n".join(lines) + "\n"


def to_svg(program: LiveProgram, now: float) -> str:
    """The last nodes as a drawing: each below all that it needs."""
    shown = _last(program)
    edges = [(source, target, kind) for source, target, kind in _edges(program) if source in shown and target in shown]
    rows = _rows(shown, edges)
    width = 2 * _MARGIN + max((len(row) for row in rows), default=1) * (_WIDTH + _GAP_X) - _GAP_X
    height = 2 * _MARGIN + max(1, len(rows)) * (_HEIGHT + _GAP_Y) - _GAP_Y
    places: dict[str, tuple[float, float]] = {}
    for level, row in enumerate(rows):
        left = (width - len(row) * (_WIDTH + _GAP_X) + _GAP_X) / 2
        for index, node_id in enumerate(row):
            places[node_id] = left + index * (_WIDTH + _GAP_X), _MARGIN + level * (_HEIGHT + _GAP_Y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12" role="img">',
        f"<title>{escape(program.public_id)}</title>",
    ]
    parts += [_drawn_edge(places[source], places[target], kind) for source, target, kind in edges]
    parts += [_drawn_node(program, node, places[node.id], now) for node in shown.values()]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _node(program: LiveProgram, node: ProgramNode) -> dict[str, Any]:
    ended = None if node.ended is None else round(node.ended - program.opened, 6)
    return {
        "id": node.id,
        "kind": node.kind,
        "name": node.name,
        "state": node.state,
        "call_id": node.call_id,
        "began_s": round(node.began - program.opened, 6),
        "ended_s": ended,
    }


def _edges(program: LiveProgram) -> Iterator[tuple[str, str, str]]:
    """What each node needs, and the conversation that it continues where it needs more than that."""
    for node in program.nodes.values():
        for source in node.inputs:
            kind = "extends" if source == node.extends else "calls" if node.kind == "tool" else "value"
            yield source, node.id, kind
        if node.extends is not None and node.extends not in node.inputs:
            yield node.extends, node.id, "extends"


def _last(program: LiveProgram) -> dict[str, ProgramNode]:
    return dict(list(program.nodes.items())[-MOST_DRAWN:])


def _rows(nodes: Iterable[str], edges: Sequence[tuple[str, str, str]]) -> list[list[str]]:
    """Nodes by the longest path to them; in each row in the order of the middle of what they hang from."""
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from((source, target) for source, target, _ in edges)
    rows: list[list[str]] = []
    column: dict[str, float] = {}
    for generation in networkx.topological_generations(graph):
        above = {node: [column[source] for source in graph.predecessors(node)] for node in generation}
        row = sorted(generation, key=lambda node: sum(above[node]) / len(above[node]) if above[node] else 0.0)
        column.update({node: index - (len(row) - 1) / 2 for index, node in enumerate(row)})
        rows.append(row)
    return rows


def _drawn_node(program: LiveProgram, node: ProgramNode, place: tuple[float, float], now: float) -> str:
    x, y = place
    border = "#b3261e" if node.state == "failed" else "#1a73e8" if node.state == "running" else "#80868b"
    radius = _HEIGHT / 2 if node.kind == "person" else 3 if node.kind == "tool" else 8
    return (
        f"<g><title>{escape(f'{node.id}: {_printable(node.name)}, {node.state}')}</title>"
        f'<rect x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="{radius:g}" '
        f'fill="{_COLOURS[node.kind]}" stroke="{border}"/>'
        f'<text x="{x + _WIDTH / 2:g}" y="{y + 19:g}" text-anchor="middle">{escape(_label(node))}</text>'
        f'<text x="{x + _WIDTH / 2:g}" y="{y + 35:g}" text-anchor="middle" fill="#5f6368">'
        f"{_time(program, node, now)}</text></g>"
    )


def _drawn_edge(source: tuple[float, float], target: tuple[float, float], kind: str) -> str:
    x, y = source[0] + _WIDTH / 2, source[1] + _HEIGHT
    to_x, to_y = target[0] + _WIDTH / 2, target[1]
    bend = (to_y - y) / 2
    style = ' stroke-width="2.5"' if kind == "extends" else ' stroke-dasharray="4 3"' if kind == "calls" else ""
    path = f"M {x:g} {y:g} C {x:g} {y + bend:g}, {to_x:g} {to_y - bend:g}, {to_x:g} {to_y:g}"
    return f'<path d="{path}" fill="none" stroke="#80868b"{style}/>'


def _label(node: ProgramNode) -> str:
    """A name that fits."""
    name = _printable(node.name)
    return name if len(name) <= MOST_LABEL else name[: MOST_LABEL - 1] + "\u2026"


def _printable(text: str) -> str:
    """Without control characters, which XML forbids."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _time(program: LiveProgram, node: ProgramNode, now: float) -> str:
    if node.state == "failed":
        return "failed"
    until = node.ended if node.ended is not None else program.ended if program.ended is not None else now
    seconds = f"{until - node.began:.2f} s"
    return seconds if node.ended is not None else f"{seconds} so far"


def _key(node: ProgramNode) -> str:
    return node.id.replace("-", "")


def _escaped(text: str) -> str:
    """Text in a label of Mermaid's, which reads entities written with #."""
    special = {"#", "&", '"', "<", ">", "`", "\\"}
    return "".join(f"#{ord(character)};" if character in special else character for character in text)
