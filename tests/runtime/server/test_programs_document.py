"""`docs/programs-over-http.md` says what is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from treadle.runtime.server import programs
from treadle.runtime.server.feed import MAX_EVENTS
from treadle.runtime.server.identity import MAX_ID_CHARACTERS, SOURCES
from treadle.runtime.server.program_events import MAX_SEEN, ProgramEnd, Step, ToolEnd, ToolStart
from treadle.runtime.server.programs_api import ROUTES
from treadle.runtime.server.roll import MAX_ENDED, MAX_NODES
from treadle.scheduler import HintAction, HintOutcome

DOCUMENT = (Path(__file__).parents[3] / "docs/programs-over-http.md").read_text()


def rows(header: str) -> list[list[str]]:
    """The cells of the table with this header, without backquotes."""
    lines = DOCUMENT[DOCUMENT.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


def choices(model: type, field: str) -> tuple[str, ...]:
    return get_args(model.model_fields[field].annotation)


def test_the_table_of_names_is_the_one_in_the_code():
    told = rows("| | where | name |")
    assert told == [
        [str(index), source.where, source.name, source.sender, source.parent, source.step, source.final]
        for index, source in enumerate(SOURCES, 1)
    ]


def test_every_endpoint_is_listed():
    listed = re.findall(r"^(POST|GET|DELETE) +(/v1/programs\S*?)(?:\?\S*)? ", DOCUMENT, re.MULTILINE)
    served = [(route.method, route.path.replace("{program_id}", "{id}")) for route in ROUTES]
    assert sorted(listed) == sorted(served)


def test_every_event_and_every_hint_is_listed():
    types = {kind for model in (ToolStart, ToolEnd, Step, ProgramEnd) for kind in choices(model, "type")}
    assert {row[0] for row in rows("| type | needs |")} == types
    assert {row[0] for row in rows("| action | the program")} == set(get_args(HintAction))
    for outcome in get_args(HintOutcome):
        assert f"`{outcome}`" in DOCUMENT


def test_every_event_of_the_feed_is_listed():
    sources = "".join(path.read_text() for path in Path(programs.__file__).parent.glob("*.py"))
    told = set(re.findall(r'\btell\(\s*program, "([a-z.]+)"', sources)) | {"gap"}
    listed = {name for row in rows("| event | when |") for name in row[0].split(", ")}
    assert listed == told and len(told) > 8


def test_the_bounds_are_those_in_the_code():
    for number, what in [
        (MAX_ID_CHARACTERS, "printable ASCII"),
        (MAX_ENDED, "programs that ended"),
        (MAX_SEEN, "are known"),
        (MAX_NODES, "turns then go on"),
        (MAX_EVENTS, "are kept"),
    ]:
        assert re.search(rf"\b{number:,}\b[^|]{{0,60}}{what}", DOCUMENT), f"{number} {what}"
