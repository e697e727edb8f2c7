import json
from statistics import fmean

import pytest

from treadle.scheduler.simulator.pauses import redraw
from treadle.scheduler.simulator.workload import Blocks, CallSpec, ProgramSpec


def program(name, *pauses, kind="tool", tool=""):
    calls = [CallSpec("main", Blocks(((0, 1),)), 10, 5)]
    calls += [CallSpec("main", Blocks(((0, 1),)), 10, 5, seconds, kind, tool) for seconds in pauses]
    return ProgramSpec(name, "kind", 0.0, tuple(calls), name)


def pauses_of(program):
    return [call.pause_s for call in program.calls[1:]]


PROGRAMS = [program("long", *[20.0] * 2000), program("short", *[10.0] * 2000)]


def drawn(text, programs=PROGRAMS, seed=0):
    again = redraw(text, programs)
    return [seconds for program in programs for seconds in pauses_of(again(program, seed))]


def test_recorded_pauses_stay():
    assert drawn("recorded") == [20.0] * 2000 + [10.0] * 2000


def test_a_log_normal_distribution_keeps_the_mean_of_the_trace():
    seconds = drawn("lognormal:0.5")
    assert fmean(seconds) == pytest.approx(15, rel=0.05)
    assert fmean(seconds[:2000]) == pytest.approx(15, rel=0.05)
    assert sorted(seconds)[2000] == pytest.approx(15 / 2.718281828**0.125, rel=0.05)


def test_bimodal_pauses_keep_the_mean_or_have_the_share_that_is_asked_for():
    seconds = drawn("bimodal:0.1:300")
    assert set(seconds) == {0.1, 300.0} and fmean(seconds) == pytest.approx(15, rel=0.2)
    assert drawn("bimodal:0.1:300:0.5").count(300.0) == pytest.approx(2000, rel=0.1)


def test_pauses_of_a_table_are_those_of_the_tool(tmp_path):
    table = tmp_path / "table.json"
    tools = {"read": {"count": 9, "p5": 1.0, "p95": 2.0}, "test": {"count": 1, "p5": 50.0, "p95": 60.0}}
    table.write_text(json.dumps({"unit": "seconds", "tools": tools}))
    assert all(50 <= s <= 60 for s in drawn(str(table), [program("p", *[1.0] * 100, tool="test")]))
    unknown = drawn(str(table), [program("p", *[1.0] * 200, tool="unheard-of")])
    assert 5 < sum(seconds >= 50 for seconds in unknown) < 50


def test_only_tools_are_drawn_people_are_not():
    waits = program("p", 100.0, kind="person")
    assert pauses_of(redraw("bimodal:1:30:0.5", PROGRAMS)(waits, 0)) == [100.0]


def test_a_seed_and_a_program_mean_the_same_pauses():
    assert drawn("lognormal:2", seed=1) == drawn("lognormal:2", seed=1) != drawn("lognormal:2", seed=2)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("somewhere.json", "no such file"),
        ("lognormal:x", "no distribution"),
        ("lognormal:-1", "no distribution"),
        ("bimodal:1", "no distribution"),
        ("bimodal:9:1", "shorter"),
        ("bimodal:1:9", "mean pause of the trace is 15 s"),
        ("bimodal:1:90:2", "from 0 to 1"),
    ],
)
def test_what_cannot_be_drawn_is_told(text, told):
    with pytest.raises(ValueError, match=told):
        drawn(text)


def test_a_trace_without_pauses_has_no_mean_to_keep():
    with pytest.raises(ValueError, match="no pauses"):
        drawn("lognormal:1", [program("p")])
