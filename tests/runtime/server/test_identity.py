"""Which program a request names: the first word in the table that is there."""

from __future__ import annotations

import pytest

from treadle.runtime.server.errors import ApiError
from treadle.runtime.server.identity import MAX_ID_CHARACTERS, SOURCES, Source, identify

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def request_naming(sources, value=lambda source: f"id of {source.name}"):
    """Headers and body in which all of these sources name a program."""
    headers, body = {}, {}
    for source in sources:
        given = TRACE if source.name == "traceparent" else value(source)
        if source.where == "header":
            headers[source.name] = given
            continue
        place, *path = body, *source.name.split(".")
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = given
    return headers, body


def expected_id(source: Source) -> str:
    if source.name == "traceparent":
        return "0af7651916cd43dd8448eb211c80319c"
    return "continued" if source.name == "previous_response_id" else f"id of {source.name}"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_every_source_names_a_program(source):
    found = identify(*request_naming([source]), continues="continued")
    assert (found.program_id, found.source) == (expected_id(source), f"{source.where}:{source.name}")


@pytest.mark.parametrize("first", range(len(SOURCES)))
def test_a_source_outweighs_all_that_come_after_it(first):
    found = identify(*request_naming(SOURCES[first:]), continues="continued")
    assert found.program_id == expected_id(SOURCES[first])


def test_nothing_names_nothing():
    assert identify({}, {}).program_id is None
    assert identify({"x-session-id": ""}, {"metadata": None, "program": "?"}).source == "inferred"


def test_a_previous_response_that_is_not_there_leaves_the_word_to_the_next():
    assert identify({}, {"previous_response_id": "resp_1", "prompt_cache_key": "key"}).program_id == "key"


def test_what_belongs_to_a_source_is_read_with_it():
    headers = {
        "x-dynamo-session-id": "child",
        "x-dynamo-parent-session-id": "parent",
        "x-dynamo-session-final": "True",
        "x-parent-session-id": "of somebody else",
    }
    found = identify(headers, {})
    assert (found.program_id, found.parent, found.final) == ("child", "parent", True)
    found = identify({}, {"program": {"id": "p", "step": "plan", "final": False, "kind": "coder"}})
    assert (found.program_id, found.step, found.final, found.kind) == ("p", "plan", False, "coder")


def test_own_words_stand_beside_any_name():
    headers = {"x-session-id": "s", "x-treadle-program-step": "plan", "x-treadle-program-parent": "p"}
    found = identify(headers, {"program": {"final": True}})
    assert (found.program_id, found.parent, found.step, found.final) == ("s", "p", "plan", True)
    assert identify({"x-treadle-program-step": "plan"}, {}).step == "plan"
    found = identify({"x-claude-code-session-id": "s", "x-dynamo-session-final": "true"}, {})
    assert (found.program_id, found.final) == ("s", True)


@pytest.mark.parametrize("odd", ["a\udcff", "\ud800", "a\nb", "\x00"])
def test_what_stands_beside_a_name_is_left_out_if_it_cannot_be_shown(odd):
    headers = {"x-session-id": "s", "x-parent-session-id": odd, "x-treadle-program-step": odd}
    found = identify(headers, {"program": {"parent": odd}})
    assert (found.program_id, found.parent, found.step) == ("s", None, None)


@pytest.mark.parametrize("bad", ["a\nb", " a", "a\u00e9", "x" * (MAX_ID_CHARACTERS + 1), 7, True, ["a"], {"a": 1}])
def test_an_own_id_that_cannot_be_one_is_an_error_with_its_name(bad):
    with pytest.raises(ApiError) as raised:
        identify({}, {"program": {"id": bad}})
    assert (raised.value.status, raised.value.param) == (400, "program.id")


@pytest.mark.parametrize("odd", ["a\nb", "gru\u00df", "x" * 5000, "\ud800", 7])
def test_an_id_that_others_made_is_replaced_by_a_digest_if_it_does_not_fit_a_header(odd):
    found = identify({}, {"prompt_cache_key": odd})
    assert found.program_id == identify({}, {"prompt_cache_key": odd}).program_id
    assert found.program_id.isascii() and found.program_id.isprintable() and len(found.program_id) < 64


@pytest.mark.parametrize("bad", ["", "00-zz", "00-" + "0" * 32 + "-b7ad6b7169203331-01"])
def test_a_trace_context_without_a_trace_names_nothing(bad):
    assert identify({"traceparent": bad}, {}).program_id is None


@pytest.mark.parametrize(
    ("body", "priority"),
    [
        ({"program": {"priority": 3}, "priority": 5}, 3),
        ({"nvext": {"agent_hints": {"priority": 4}}}, 4),
        ({"nvext": {"agent_hints": {"priority": "high"}}}, 0),
        ({"priority": 5}, -5),
        ({"priority": -1000}, 10),
        ({"priority": float("nan")}, 0),
        ({"priority": True}, 0),
        ({"service_tier": "priority"}, 1),
        ({"service_tier": "auto"}, 0),
    ],
)
def test_urgency_is_read_from_whoever_says_it(body, priority):
    assert identify({}, body).priority == priority


@pytest.mark.parametrize(
    ("body", "due_s"),
    [
        ({"program": {"deadline_s": 30}}, 30),
        ({"program": {"objective": "throughput"}}, 3600.0),
        ({"service_tier": "flex"}, 3600.0),
        ({"service_tier": "flex", "program": {"objective": "latency"}}, None),
        ({}, None),
    ],
)
def test_deadlines_are_read_too(body, due_s):
    assert identify({}, body).due_s == due_s


@pytest.mark.parametrize(
    ("program", "param"),
    [
        ({"priority": 11}, "program.priority"),
        ({"priority": True}, "program.priority"),
        ({"deadline_s": 0}, "program.deadline_s"),
        ({"deadline_s": float("inf")}, "program.deadline_s"),
        ({"objective": "fast"}, "program.objective"),
        ({"kind": "\x00"}, "program.kind"),
    ],
)
def test_own_words_that_make_no_sense_are_errors(program, param):
    with pytest.raises(ApiError) as raised:
        identify({}, {"program": program})
    assert raised.value.param == param
