import gzip
import json
import lzma

import pytest

from treadle.scheduler.simulator.traces import TraceError, files, read


def write(path, *rows, opened=open):
    """Writes JSON lines; a row that is text stays as it is."""
    with opened(path, "wt") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return path


def request(t, tokens, keep, *new, out=10, kind="tool_result", think=5.0, **more):
    fields = {"t": t, "type": "n", "in": tokens, "out": out, "keep": keep, "new": list(new), "api_time": 2.0}
    return fields | {"input_types": [kind], "stop": "tool_use", "think_time": think} | more


def agent(name, duration_ms, *requests):
    return {"t": 0.0, "type": "subagent", "agent_id": name, "duration_ms": duration_ms, "requests": list(requests)}


def claude(*requests):
    return {"id": "trace_1", "block_size": 64, "hash_id_scope": "local", "requests": list(requests)}


def calls_of(path, *requests):
    workload = read(write(path, claude(*requests)))
    assert len(workload.programs) == 1
    return workload.programs[0].calls


class TestClaudeCode:
    def test_rebuilds_prompts_from_differences(self, tmp_path):
        first = request(0, 200, 0, [1, 3], kind="text", think=0.0)
        calls = calls_of(tmp_path / "c.jsonl", first, request(9, 330, 2, [4, 2], [9, 1]))
        assert [list(call.prompt)[:5] for call in calls] == [[1, 2, 3, 11], [1, 2, 4, 5, 9]]
        assert [len(call.prompt) for call in calls] == [4, 6]
        assert [(call.prompt_tokens, call.output_tokens) for call in calls] == [(200, 10), (330, 10)]

    def test_tells_tools_from_people(self, tmp_path):
        calls = calls_of(
            tmp_path / "c.jsonl",
            request(0, 64, 0, [1, 1], kind="text"),
            request(9, 64, 1, think=4.0),
            request(20, 64, 1, kind="text", think=7.0),
        )
        assert [(call.pause_s, call.pause_kind) for call in calls] == [(0.0, "none"), (4.0, "tool"), (7.0, "person")]

    def test_believes_the_end_of_a_turn_over_the_kinds_of_a_whole_history(self, tmp_path):
        calls = calls_of(
            tmp_path / "c.jsonl",
            request(0, 64, 0, [1, 1], stop="end_turn"),
            request(9, 64, 1, input_types=["text", "tool_result", "tool_use"]),
        )
        assert calls[1].pause_kind == "person"

    def test_takes_a_missing_pause_from_the_times(self, tmp_path):
        calls = calls_of(tmp_path / "c.jsonl", request(0, 64, 0, [1, 1]), request(9, 64, 1, think=None))
        assert calls[1].pause_s == 9 - 2

    def test_runs_agents_where_they_stand_and_takes_their_time_off_the_pause(self, tmp_path):
        calls = calls_of(
            tmp_path / "c.jsonl",
            request(0, 64, 0, [1, 1]),
            agent("a1", 60_000, request(0, 128, 0, [5, 2]), request(9, 192, 2, [7, 1], think=3.0)),
            agent("a2", 90_000, request(0, 64, 0, [20, 1])),
            request(100, 64, 1, think=95.0),
        )
        assert [call.stream for call in calls] == ["main", "a1", "a1", "a2", "main"]
        assert [call.pause_s for call in calls] == [0.0, 0.0, 3.0, 0.0, 5.0]
        assert [call.pause_kind for call in calls] == ["none", "none", "tool", "none", "agent"]

    def test_does_not_wait_for_agents_in_the_background(self, tmp_path):
        background = agent("a1", None, request(0, 64, 0, [5, 1]), request(80, 64, 1))
        calls = calls_of(tmp_path / "c.jsonl", request(0, 64, 0, [1, 1]), background, request(10, 64, 1, think=8.0))
        assert (calls[-1].pause_s, calls[-1].pause_kind) == (8.0, "tool")

    @pytest.mark.parametrize(
        ("row", "complaint"),
        [
            (claude(request(0, 64, 3, [1, 1])), "keeps 3 blocks of a prompt that has 0"),
            (claude(request(0, 6400, 0, [1, 1])), "1 blocks of 64 tokens"),
            (claude(request(0, 64, 0, [1])), "new must be"),
            (claude(request(0, "64", 0, [1, 1])), "in must be a whole number"),
            (claude(), "without calls"),
        ],
    )
    def test_names_the_line_that_makes_no_sense(self, tmp_path, row, complaint):
        path = write(tmp_path / "c.jsonl", claude(request(0, 64, 0, [1, 1])), row)
        with pytest.raises(TraceError, match=rf"c\.jsonl:2: .*{complaint}"):
            read(path)


class TestMooncake:
    def test_shares_blocks_across_the_file(self, tmp_path):
        row = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}
        workload = read(
            write(tmp_path / "m.jsonl.gz", row, row | {"timestamp": 1500, "hash_ids": [0, 2]}, opened=gzip.open)
        )
        first, second = workload.programs
        assert (workload.name, workload.block_tokens) == ("m", 512)
        assert (first.start_s, second.start_s) == (0.0, 1.5)
        one, two = workload.prompt_ids(first, 0), workload.prompt_ids(second, 0)
        assert len(one) == 600
        assert one[:512] == two[:512] and one[512] != two[512]

    def test_wants_all_blocks(self, tmp_path):
        row = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0]}
        with pytest.raises(TraceError, match=r"m\.jsonl:1: hash_ids"):
            read(write(tmp_path / "m.jsonl", row))


class TestLmcache:
    def session(self, second, text, output="done", session="s"):
        return {"timestamp": 10_000_000 + int(second * 1e6), "input": text, "output": output, "session_id": session}

    def test_counts_characters_and_shares_texts_that_begin_alike(self, tmp_path):
        begin = "x" * 130
        workload = read(
            write(
                tmp_path / "l.jsonl.xz",
                self.session(0, begin, "y" * 9),
                self.session(3, begin + "y" * 9 + "z" * 70),
                self.session(4, begin + "w" * 70, session="t"),
                opened=lzma.open,
            )
        )
        first, other = workload.programs
        assert [(call.prompt_tokens, call.output_tokens) for call in first.calls] == [(33, 3), (53, 1)]
        assert [call.pause_s for call in first.calls] == [0.0, 3.0]
        assert other.start_s == 4.0
        assert first.calls[0].prompt.part(0, 2) == other.calls[0].prompt.part(0, 2)
        said = workload.prompt_ids(first, 0) + workload.output_ids(first, 0)
        assert said == workload.prompt_ids(first, 1)[:36]

    def test_sorts_calls_by_time_and_separates_conversations(self, tmp_path):
        rows = [
            self.session(2, "coder: do"),
            self.session(0, "planner: go"),
            self.session(5, "planner: go on"),
            self.session(6, "planner: go on now"),
        ]
        calls = read(write(tmp_path / "l.jsonl", *rows)).programs[0].calls
        assert [call.stream for call in calls] == ["stream-0", "stream-1", "stream-0", "stream-0"]
        assert [call.pause_kind for call in calls] == ["none", "agent", "agent", "tool"]


def test_tau_bench_makes_a_call_of_each_message_of_the_assistant(tmp_path):
    tool = {"function": {"name": "book", "arguments": '{"seat": 3}'}, "id": "1", "type": "function"}
    messages = [
        {"role": "system", "content": "policy"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": None, "tool_calls": [tool]},
        {"role": "tool", "content": "booked", "name": "book"},
        {"role": "assistant", "content": "it is booked"},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "bye"},
    ]
    text = json.dumps([{"task_id": 4, "trial": 1, "reward": 1.0, "traj": messages}], indent=2)
    workload = read(write(tmp_path / "t.json", text))
    (program,) = workload.programs
    assert program.id == "4/1"
    assert [(call.pause_kind, call.tool) for call in program.calls] == [("none", ""), ("tool", "book"), ("person", "")]
    for index in range(2):
        said = workload.prompt_ids(program, index) + workload.output_ids(program, index)
        following = workload.prompt_ids(program, index + 1)
        assert said == following[: len(said)]


def test_continuum_waits_as_long_as_its_tools_ran(tmp_path):
    def tool(seconds):
        return {"function": {"name": "bash", "arguments": "{}"}, "execution_time_seconds": seconds}

    messages = [
        {"role": "user", "content": [{"type": "text", "text": "fix it"}]},
        {"role": "assistant", "content": "look", "tool_calls": [tool(0.5), tool(0.25)]},
        {"role": "tool", "content": [{"type": "text", "text": "here"}]},
        {"role": "assistant", "content": "fixed"},
    ]
    path = write(tmp_path / "c.json", [{"traj_id": "django.1", "messages": json.dumps(messages)}])
    (program,) = read(path).programs
    assert [(call.pause_s, call.pause_kind, call.tool) for call in program.calls] == [
        (0.0, "none", ""),
        (0.75, "tool", "bash"),
    ]


TASK = {
    "id": "multi_turn_base_0",
    "question": [[{"role": "user", "content": "go there and look"}], [{"role": "user", "content": "sort"}]],
    "involved_classes": ["MathAPI"],
    "excluded_function": ["log"],
}
ANSWER = {"id": "multi_turn_base_0", "ground_truth": [["cd('a')", "ls()"], ["sort('f')"]]}


class TestBfcl:
    def write(self, folder, answer):
        (folder / "possible_answer").mkdir()
        (folder / "multi_turn_func_doc").mkdir()
        tools = [{"name": "mean", "description": "x" * 400}, {"name": "log", "description": "y" * 4000}]
        write(folder / "multi_turn_func_doc" / "math_api.json", *tools)
        write(folder / "possible_answer" / "b.json", answer)
        return write(folder / "b.json", TASK)

    def test_makes_a_call_of_each_expected_call_and_of_each_answer(self, tmp_path):
        (program,) = read(self.write(tmp_path, ANSWER)).programs
        assert [(call.pause_kind, call.tool) for call in program.calls] == [
            ("none", ""),
            ("tool", "cd"),
            ("tool", "ls"),
            ("person", ""),
            ("tool", "sort"),
        ]
        assert 100 < program.calls[0].prompt_tokens < 200

    def test_wants_the_answers(self, tmp_path):
        path = self.write(tmp_path, ANSWER | {"id": "another"})
        with pytest.raises(TraceError, match="no answer to multi_turn_base_0"):
            read(path)


def recorded(*calls, name="p", recording="r"):
    fields = {"recording": recording, "program": name, "kind": "k", "start_s": 1.5, "block_tokens": 16}
    return fields | {"calls": list(calls)}


def recorded_call(blocks, tokens, after=(), stream=0, **more):
    fields = {"stream": stream, "blocks": blocks, "prompt_tokens": tokens, "output_tokens": 3, "after": list(after)}
    return fields | {"pause_s": 0.5, "pause_kind": "none", "tool": "", "foreseen": False} | more


class TestRecorded:
    def test_has_graphs_and_the_last_block_of_each_prompt(self, tmp_path):
        turns = recorded_call([[0, 2]], 40), recorded_call([[0, 4]], 70, [0], pause_kind="tool", tool="search")
        beside = recorded_call([[0, 1], [9, 1]], 40, [0], stream=1, foreseen=True)
        path = write(tmp_path / "r.jsonl", recorded(*turns, beside), recorded(turns[0], recording="s"))
        workload = read(path)
        first, second = workload.programs
        assert (workload.block_tokens, first.id, first.kind, first.start_s) == (16, "0/p", "k", 1.5)
        assert [(call.stream, call.after, call.foreseen) for call in first.calls] == [
            ("0", (), False),
            ("0", (0,), False),
            ("1", (0,), True),
        ]
        assert [(call.pause_s, call.pause_kind, call.tool) for call in first.calls[:2]] == [
            (0.5, "none", ""),
            (0.5, "tool", "search"),
        ]
        assert list(first.calls[0].prompt) == [0, 1, 2]
        one, two, three = (workload.prompt_ids(first, index) for index in range(3))
        assert two[:40] == one and three[:16] == one[:16] and three[16] != one[16]
        assert workload.prompt_ids(second, 0)[0] != one[0], "another recording"

    @pytest.mark.parametrize(
        ("row", "complaint"),
        [
            (recorded(), "without calls"),
            (recorded(recorded_call([[0, 1]], 40)), "1 blocks of 16 tokens for a prompt of 40"),
            (recorded(recorded_call([[0, -1]], 4)), "cannot be"),
            (recorded(recorded_call([0], 4)), "blocks must be"),
            (recorded(recorded_call([], 4, [0])), "cannot wait for"),
            (recorded(recorded_call([], 0)), "needs tokens"),
            (recorded(recorded_call([], 4, pause_kind="lunch")), "pause_kind must be one of tool, person"),
            (recorded(recorded_call([], 4)) | {"block_tokens": 64}, "block_tokens must be 16"),
            ('{"recording": "r", "prog', "not JSON"),
        ],
    )
    def test_names_the_line_that_makes_no_sense(self, tmp_path, row, complaint):
        path = write(tmp_path / "r.jsonl", recorded(recorded_call([], 4)), row)
        with pytest.raises(TraceError, match=rf"r\.jsonl:2: .*{complaint}"):
            read(path)


def test_azure_starts_at_the_first_request_and_shares_nothing(tmp_path):
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 23:59:59.5000000,40,10", "2023-11-17 00:00:01,40,8"]
    workload = read(write(tmp_path / "a.csv", *rows))
    first, second = workload.programs
    assert (first.start_s, second.start_s) == (0.0, 1.5)
    assert workload.prompt_ids(first, 0)[0] != workload.prompt_ids(second, 0)[0]
    assert (first.calls[0].prompt_tokens, first.calls[0].output_tokens) == (40, 10)


class TestFiles:
    def test_that_are_not_there_are_named(self, tmp_path):
        with pytest.raises(TraceError, match=r"nowhere\.jsonl: No such file"):
            read(tmp_path / "nowhere.jsonl")

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (b"", "empty"),
            (b"hello\n", "no known trace"),
            (b'{"a": 1}\n', "no known trace"),
            (b'[{"a": 1}]\n', "no known trace"),
            (b'{"hash_ids": [\n', ":1: not JSON"),
            (b"[" * 100_000, "not JSON"),
            (b"\xff\xfe\xff", ":1: not text"),
            (gzip.compress(b"x" * 10_000, mtime=0)[:-20], "damaged after line 0"),
            (b"client,window_start_s,rate_rps\n", "read_rates"),
            (b'{\n "unit": "seconds"\n}\n', "PauseTable"),
            (b"TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", ":2: 'yesterday' is not a time"),
            (b"TIMESTAMP,ContextTokens,GeneratedTokens\n1,2\n", ":2: expected TIMESTAMP"),
        ],
    )
    def test_that_are_no_traces_are_refused_with_the_reason(self, tmp_path, content, complaint):
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(TraceError, match=complaint):
            read(path)

    def test_have_lines_of_bounded_length(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
        with pytest.raises(TraceError, match=r"m\.jsonl:2: a line of more than 100 bytes"):
            list(files.lines(write(tmp_path / "m.jsonl", "x" * 90, "x" * 200)))

    def test_have_bounded_contents_however_small_they_are_packed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "MAX_FILE_BYTES", 1000)
        with pytest.raises(TraceError, match="more than 1000 bytes"):
            list(files.lines(write(tmp_path / "m.gz", *["x" * 90] * 20, opened=gzip.open)))
