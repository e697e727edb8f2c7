"""A program's graph in three forms: they say the same, and no name breaks out of any of them."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from treadle.runtime.server.graph_view import MOST_DRAWN, to_json, to_mermaid, to_svg
from treadle.runtime.server.program import LiveProgram, ProgramNode
from treadle.runtime.server.tenants import EVERYBODY

SVG = "{http://www.w3.org/2000/svg}"


def program(*nodes: ProgramNode, name: str = "p") -> LiveProgram:
    live = LiveProgram("program-1", name, EVERYBODY, "api", "", None, 0, 600.0, 100.0, 1.7e9, 100.0)
    live.nodes = {node.id: node for node in nodes}
    return live


def agent(tool: str = "search") -> LiveProgram:
    """A turn that calls two tools, and the turn after them."""
    return program(
        ProgramNode("llm-1", "llm", "plan", (), 100.0, ended=101.0, state="done"),
        ProgramNode("tool-2", "tool", tool, ("llm-1",), 101.0, call_id="c1", ended=103.5, state="done"),
        ProgramNode("tool-3", "tool", "fetch", ("llm-1",), 101.0, call_id="c2", ended=102.0, state="failed"),
        ProgramNode("llm-4", "llm", "answer", ("tool-2", "tool-3"), 104.0, extends="llm-1"),
    )


def test_json_has_all_nodes_and_edges():
    graph = to_json(agent(), 110.0)
    assert json.loads(json.dumps(graph)) == graph
    assert [(node["id"], node["state"], node["began_s"], node["ended_s"]) for node in graph["nodes"]] == [
        ("llm-1", "done", 0.0, 1.0),
        ("tool-2", "done", 1.0, 3.5),
        ("tool-3", "failed", 1.0, 2.0),
        ("llm-4", "running", 4.0, None),
    ]
    assert [(edge["source"], edge["target"], edge["kind"]) for edge in graph["edges"]] == [
        ("llm-1", "tool-2", "calls"),
        ("llm-1", "tool-3", "calls"),
        ("tool-2", "llm-4", "value"),
        ("tool-3", "llm-4", "value"),
        ("llm-1", "llm-4", "extends"),
    ]


def test_mermaid_names_nodes_and_draws_edges():
    assert to_mermaid(agent(), 110.0).splitlines() == [
        "flowchart TD",
        '    llm1["plan 1.00 s"]',
        '    tool2[["search 2.50 s"]]',
        '    tool3[["fetch failed"]]',
        '    llm4["answer 6.00 s so far"]',
        "    llm1 -.-> tool2",
        "    llm1 -.-> tool3",
        "    tool2 --> llm4",
        "    tool3 --> llm4",
        "    llm1 ==> llm4",
    ]


def test_svg_draws_each_node_below_what_it_needs():
    root = ElementTree.fromstring(to_svg(agent(), 110.0))
    boxes = [(float(box.get("x")), float(box.get("y"))) for box in root.iter(f"{SVG}rect")]
    assert boxes[0][1] < boxes[1][1] == boxes[2][1] < boxes[3][1]
    assert boxes[1][0] != boxes[2][0]
    assert len(list(root.iter(f"{SVG}path"))) == 5
    assert "search" in [text.text for text in root.iter(f"{SVG}text")]


NASTY = ['"]; click x "', "<script>alert(1)</script>", "a\nb", "&quot;", "#quot;", "\x00\x1b", "]]>", "`\\", "\ud800"]


@pytest.mark.parametrize("name", NASTY)
def test_no_name_breaks_out(name):
    live = agent(name)
    for line in to_mermaid(live, 110.0).splitlines()[1:]:
        label = re.fullmatch(r'    \w+(\[\[|\[|\(\[)"([^"<>&`\n]*)"(\]\]|\]|\]\))|    \w+ (-->|==>|-\.->) \w+', line)
        assert label is not None, line
    root = ElementTree.fromstring(to_svg(live, 110.0).encode(errors="replace"))
    assert {child.tag for child in root.iter()} == {SVG + tag for tag in ("svg", "title", "path", "g", "rect", "text")}


def test_an_empty_graph_is_drawn_too():
    live = program(name="<&>")
    assert to_json(live, 101.0)["nodes"] == []
    assert to_mermaid(live, 101.0) == "flowchart TD\n"
    assert ElementTree.fromstring(to_svg(live, 101.0)).find(f"{SVG}title").text == "<&>"


def test_of_a_long_program_the_last_nodes_are_drawn():
    nodes = [ProgramNode("llm-1", "llm", "turn", (), 100.0)]
    for index in range(2, 1002):
        nodes.append(ProgramNode(f"llm-{index}", "llm", "turn", (f"llm-{index - 1}",), 100.0, f"llm-{index - 1}"))
    live = program(*nodes)
    assert len(to_json(live, 101.0)["nodes"]) == 1001
    assert len(list(ElementTree.fromstring(to_svg(live, 101.0)).iter(f"{SVG}rect"))) == MOST_DRAWN
    assert "llm802" in to_mermaid(live, 101.0) and "llm801[" not in to_mermaid(live, 101.0)
