"""The recorder on its own: commands and events at given times in, lines out."""

from __future__ import annotations

import json
import resource
import warnings
from pathlib import Path

import pytest

from treadle.runtime import recorder as recorder_module
from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.recorder import Recorder
from treadle.scheduler import (
    AppendPrompt,
    CallFinished,
    DeclareNode,
    EndProgram,
    OpenProgram,
    ProgramEnded,
    Rejected,
    Resume,
    SubmitCall,
    Usage,
    Wait,
)
from treadle.scheduler.simulator.traces import read

SYSTEM = tuple(range(1000, 1048))
"""Three blocks that prompts begin with."""


class Session:
    """What a session would tell of programs, second by second."""

    def __init__(self, path):
        self.path, self.now = path, 100.0
        self.recorder = Recorder(path, lambda: self.now)

    def at(self, second, *batch):
        self.now = 100.0 + second
        self.recorder.see(batch)

    def node(self, second, name, *inputs, kind="llm", program="p", **more):
        self.at(second, DeclareNode(program, name, kind, name, inputs, **more))

    def tool(self, began, ended, name, *inputs):
        self.node(began, name, *inputs, kind="tool")
        self.at(began, Wait("p", name))
        self.at(ended, Resume("p", name))

    def call(self, second, name, *more, program="p", extends=None, attempt=0, node=True):
        """A call of a node, whose prompt is the common one and `more`."""
        node_id, extends = (name if node else None), extends and f"{extends}/0"
        submit = SubmitCall(f"{name}/{attempt}", program, (*SYSTEM, *more), node_id=node_id, extends=extends)
        self.at(second, submit)

    def finish(self, second, name, tokens=5, reason="stop", attempt=0):
        self.at(second, CallFinished(f"{name}/{attempt}", reason, Usage(decoded=tokens)))

    def end(self, second, program="p"):
        self.at(second, EndProgram(program))
        self.at(second, ProgramEnded(program, 0, Usage()))

    def lines(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def calls(self, *fields):
        """Some fields of the calls of the only program."""
        (line,) = self.lines()
        return [tuple(call[name] for name in fields) for call in line["calls"]]


@pytest.fixture
def session(tmp_path):
    session = Session(tmp_path / "trace.jsonl")
    session.at(0, OpenProgram("p", "kind"))
    return session


class TestGraph:
    def test_calls_wait_for_the_nearest_calls_before_them_and_for_the_tools_between(self, session):
        session.node(0, "plan")
        session.call(0, "plan")
        session.finish(4, "plan")
        for name in ("left", "right"):
            session.node(4, name, "plan")
            session.call(4, name)
        session.node(4, "both", "left", "right", kind="gather")
        session.node(4, "merge", "both", "lookup")
        session.tool(4, 6, "lookup", "plan")
        session.finish(5, "left")
        session.finish(9, "right")
        session.call(11, "merge")
        session.finish(12, "merge", tokens=7)
        session.end(13)
        assert session.calls("after", "pause_s", "pause_kind", "tool", "foreseen", "output_tokens") == [
            ([], 0.0, "none", "", False, 5),
            ([0], 0.0, "none", "", False, 5),
            ([0], 0.0, "none", "", False, 5),
            ([1, 2], 2.0, "tool", "lookup", True, 7),
        ]
        (program,) = read(session.path).programs
        assert (program.id, program.kind, program.start_s, len(program.calls)) == ("0/p", "kind", 0.0, 4)

    def test_a_value_that_was_awaited_and_passed_on_as_text_leads_from_what_ended_last(self, session):
        session.tool(1, 2, "fetch")
        session.node(2, "plan")
        session.call(2, "plan")
        session.finish(5, "plan")
        for name in ("one", "two"):
            session.node(6, name)
            session.call(6, name)
        session.finish(7, "two")
        session.tool(7, 9, "search")
        session.node(9, "three")
        session.call(9, "three")
        for name in ("one", "three"):
            session.finish(10, name)
        session.end(10)
        assert session.calls("after", "pause_s", "tool") == [
            ([], 2.0, "fetch"),
            ([0], 1.0, ""),
            ([0], 1.0, ""),
            ([2], 2.0, "search"),
        ]

    def test_turns_of_a_conversation_are_a_stream_and_wait_for_its_tools_or_for_somebody(self, session):
        session.node(0, "first")
        session.call(0, "first")
        session.node(1, "flip", kind="tool")
        session.finish(2, "first")
        session.at(3, Resume("p", "flip"))
        session.node(3, "second", "first", "flip", extends="first")
        session.call(3, "second", *range(40), extends="first")
        session.finish(5, "second")
        session.node(8, "third", "second", extends="second")
        session.call(8, "third", *range(80), extends="second")
        session.node(8, "aside")
        session.call(8, "aside")
        for name in ("third", "aside"):
            session.finish(9, name)
        session.end(9)
        assert session.calls("stream", "after", "pause_s", "pause_kind", "tool") == [
            (0, [], 0.0, "none", ""),
            (0, [0], 1.0, "tool", "flip"),
            (0, [1], 3.0, "person", ""),
            (1, [1], 3.0, "none", ""),
        ]

    def test_a_call_that_is_tried_again_goes_on_with_its_first_attempt(self, session):
        session.node(0, "typed")
        session.call(0, "typed")
        session.node(0, "next", "typed")
        session.finish(2, "typed")
        session.call(2, "typed", *range(30), attempt=1)
        session.finish(3, "typed", attempt=1)
        session.call(3, "next")
        session.finish(4, "next")
        session.end(4)
        assert session.calls("stream", "after", "pause_kind") == [(0, [], "none"), (0, [0], "none"), (1, [1], "none")]

    def test_a_prompt_that_grows_is_complete_when_it_is_closed(self, session):
        session.node(0, "write")
        session.call(0, "write")
        session.node(0, "review", "write")
        session.at(0, SubmitCall("review/0", "p", SYSTEM[:40], open=True, node_id="review"))
        session.at(1, AppendPrompt("review/0", SYSTEM[40:]))
        session.finish(3, "write")
        session.at(3.5, AppendPrompt("review/0", (7, 8), close=True))
        session.finish(5, "review")
        session.end(5)
        assert session.calls("after", "pause_s", "prompt_tokens", "blocks") == [
            ([], 0.0, 48, [[0, 3]]),
            ([0], 0.5, 50, [[0, 3]]),
        ]

    def test_what_did_not_finish_is_left_out_and_waited_through(self, session):
        session.node(0, "plan")
        session.call(0, "plan")
        session.finish(1, "plan")
        session.node(1, "lost", "plan")
        session.call(1, "lost")
        session.finish(2, "lost", reason="aborted")
        session.node(2, "late", "lost")
        session.call(3, "late")
        session.finish(4, "late", reason="length")
        session.node(4, "never", "late")
        session.call(4, "never")
        session.end(5)
        assert session.calls("after", "pause_s") == [([], 0.0), ([0], 2.0)]

    def test_without_nodes_a_call_follows_what_ended_last_or_what_it_extends(self, session):
        session.call(0, "a", node=False)
        session.call(0, "b", node=False)
        session.finish(1, "a")
        session.finish(2, "b")
        session.call(3, "c", *range(20), node=False, extends="a")
        session.call(3, "d", node=False)
        for name in ("c", "d"):
            session.finish(4, name)
        session.end(4)
        assert session.calls("stream", "after", "pause_s") == [
            (0, [], 0.0),
            (1, [], 0.0),
            (0, [0], 2.0),
            (2, [1], 1.0),
        ]


class TestPrompts:
    def test_are_numbers_that_are_equal_as_far_as_prompts_begin_alike(self, session):
        for name, more in (("a", range(20)), ("b", range(20)), ("c", range(1, 40))):
            session.call(0, name, *more, node=False)
            session.finish(1, name)
        session.end(1)
        assert session.calls("blocks") == [([[0, 4]],), ([[0, 4]],), ([[0, 3], [4, 2]],)]

    def test_are_not_shared_between_tenants(self, session):
        session.at(0, OpenProgram("q", "kind", tenant="other"))
        session.call(0, "a", node=False)
        session.call(0, "b", node=False, program="q")
        for name in "ab":
            session.finish(1, name)
        for program in "pq":
            session.end(1, program)
        assert [line["calls"][0]["blocks"] for line in session.lines()] == [[[0, 3]], [[3, 3]]]
        assert "other" not in session.path.read_text()

    def test_have_other_names_in_another_recording_of_the_same_file(self, tmp_path):
        for _ in range(2):
            session = Session(tmp_path / "trace.jsonl")
            session.at(0, OpenProgram("p", "kind"))
            session.call(0, "a", node=False)
            session.finish(1, "a")
            session.end(1)
        first, second = read(session.path).programs
        assert (first.calls, first.salt != second.salt) == (second.calls, True)


def test_calls_that_have_nothing_to_do_with_each_other_are_programs_of_their_own(session):
    session.recorder.separate.add("p")
    session.call(1, "a", node=False)
    session.at(1, SubmitCall("fork/0", "p", SYSTEM, fork_of="a/0"))
    session.call(2, "b", node=False)
    session.finish(3, "a")
    assert session.lines() == []
    session.finish(4, "fork")
    session.finish(5, "b")
    found = [(line["program"], line["start_s"], [call["after"] for call in line["calls"]]) for line in session.lines()]
    assert found == [("a/0", 1.0, [[], []]), ("b/0", 2.0, [[]])]


class TestMemory:
    def test_of_blocks_is_bounded(self, session, monkeypatch):
        monkeypatch.setattr(recorder_module, "MAX_BLOCKS", 3)
        for index, more in enumerate(((), range(16), range(16, 32), range(16))):
            session.call(index, str(index), *more, node=False)
            session.finish(index, str(index))
        session.end(9)
        assert len(session.recorder._blocks._numbers) == 3
        assert session.calls("blocks")[0] == ([[0, 3]],)

    def test_of_calls_is_bounded(self, session, monkeypatch):
        monkeypatch.setattr(recorder_module, "MAX_CALLS", 2)
        for index in range(5):
            session.call(index, str(index), node=False)
            session.finish(index, str(index))
        session.end(9)
        assert len(session.calls("after")) == 2

    def test_of_programs_that_the_engine_refused_is_freed(self, session):
        session.at(1, OpenProgram("q", "kind"))
        session.call(1, "a", program="q")
        session.at(1, CallFinished("a/0", "error", Usage(), error="unknown_program"))
        session.at(1, EndProgram("q"))
        session.at(1, Rejected("q", "unknown_program", "it is not open"))
        session.end(2)
        assert not session.recorder._programs and not session.recorder._live and session.lines() == []


class TestTrouble:
    @pytest.mark.parametrize("name", ["nowhere/trace.jsonl", "."])
    def test_a_path_that_cannot_be_written_is_refused_at_once(self, tmp_path, name):
        with pytest.raises(InvalidRequestError, match=r"cannot be recorded here: .*; give the path of a file"):
            Recorder(tmp_path / name)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
    def test_a_full_disk_is_one_warning_and_no_error(self):
        session = Session(Path("/dev/full"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for program in ("p", "q"):
                session.at(0, OpenProgram(program, "kind"))
                session.call(0, program, program=program, node=False)
                session.finish(1, program)
                session.end(2, program)
        (warning,) = caught
        assert "/dev/full: recording has ended: No space left on device" in str(warning.message)

    def test_a_disk_that_fills_up_leaves_whole_lines(self, session):
        session.call(0, "a", node=False)
        session.finish(1, "a")
        session.end(2)
        size = session.path.stat().st_size
        session.at(3, OpenProgram("q", "kind"))
        session.call(3, "b", program="q", node=False)
        session.finish(4, "b")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
        try:
            with pytest.warns(RuntimeWarning, match="recording has ended: File too large"):
                session.end(5, "q")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert session.path.stat().st_size == size and len(session.lines()) == 1

    def test_what_it_cannot_make_sense_of_is_one_warning_and_no_error(self, session):
        with pytest.warns(RuntimeWarning, match="recording has ended"):
            session.at(0, SubmitCall("a", "p", ("no token",) * 16))
        session.call(1, "b")
        session.end(2)
        assert session.lines() == []
