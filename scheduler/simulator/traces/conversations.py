"""Traces of agents with the full text of what they sent: each session or trajectory is a program."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from treadle.scheduler.simulator.traces.files import Line, Record, TraceError
from treadle.scheduler.simulator.traces.text import TextCall, TextPrograms
from treadle.scheduler.simulator.workload import PauseKind, ProgramSpec

MAIN = "main"


def lmcache(lines: Iterable[Line], salt: str) -> tuple[ProgramSpec, ...]:
    """Sessions of LMCache/lmcache-agent-trace: whole prompts and answers with times in microseconds.

    A call goes on with the stream whose last prompt it begins with (the longest such), else it begins a stream. Only
    one time is recorded for a call, so a pause is the whole time since the call before it and **includes the time of
    the model**; nothing is taken off. It counts as a tool's where the stream goes on, as an agent's where another
    stream takes over. Sessions start when their first call did, the earliest at 0.
    """
    sessions: dict[str, list[Record]] = {}
    for line in lines:
        record = Record.parse(line)
        sessions.setdefault(record.text("session_id"), []).append(record)
    for records in sessions.values():
        records.sort(key=lambda record: record.integer("timestamp"))
    begin = min((records[0].integer("timestamp") for records in sessions.values()), default=0)
    programs = TextPrograms("lmcache-agent", salt)
    for name, records in sessions.items():
        programs.add(name, (records[0].integer("timestamp") - begin) / 1e6, _session_calls(records))
    return programs.programs()


def _session_calls(records: list[Record]) -> Iterator[TextCall]:
    last_prompts: dict[str, str] = {}
    before: tuple[int, str] | None = None
    for record in records:
        prompt, time_us = record.text("input"), record.integer("timestamp")
        extended = [stream for stream, last in last_prompts.items() if prompt.startswith(last)]
        stream = max(extended, key=lambda name: len(last_prompts[name]), default=f"stream-{len(last_prompts)}")
        last_prompts[stream] = prompt
        pause_s = 0.0
        kind: PauseKind = "none"
        if before is not None:
            pause_s, kind = (time_us - before[0]) / 1e6, "tool" if before[1] == stream else "agent"
        yield TextCall(stream, prompt, record.text("output"), pause_s, kind)
        before = (time_us, stream)


def tau_bench(trajectories: Iterable[Record], salt: str) -> tuple[ProgramSpec, ...]:
    """Trajectories of sierra-research/tau-bench (`historical_trajectories/*.json`): messages, tool calls, no times.

    Every message of the assistant is a call whose prompt is all messages before it. The descriptions of the tools were
    part of the real prompts, but are not in the trajectories. Nothing is recorded of time: all pauses are 0 s, and say
    what they wait for.
    """
    programs = TextPrograms("tau-bench", salt)
    for trajectory in trajectories:
        name = f"{trajectory.integer('task_id')}/{int(trajectory.number('trial', 0))}"
        programs.add(name, 0.0, _message_calls(trajectory.records("traj")))
    return programs.programs()


def continuum(trajectories: Iterable[Record], salt: str) -> tuple[ProgramSpec, ...]:
    """SWE-smith trajectories with timed tool calls, as in Whrlicht/vllm-continuum (`trace_data/test.json`).

    Every message of the assistant is a call whose prompt is all messages before it; its pause is the sum of
    `execution_time_seconds` of the tool calls before it.
    """
    programs = TextPrograms("continuum", salt)
    for trajectory in trajectories:
        where = f"{trajectory.where}: messages"
        try:
            messages = json.loads(trajectory.text("messages"))
        except json.JSONDecodeError as error:
            raise TraceError(f"{where}: not JSON: {error}") from None
        if not isinstance(messages, list):
            raise TraceError(f"{where}: expected a list")
        calls = _message_calls([Record.of(where, message) for message in messages])
        programs.add(trajectory.text("traj_id"), 0.0, calls)
    return programs.programs()


def _message_calls(messages: Iterable[Record]) -> Iterator[TextCall]:
    """A call for each message of the assistant. What it waited for is what the message before it says."""
    text, tool, pause_s, kind = "", "", 0.0, "none"
    first = True
    for message in messages:
        role, content = message.text("role"), _content(message)
        if role == "assistant":
            tools = message.records("tool_calls", optional=True)
            content += "".join(json.dumps(call.data.get("function"), ensure_ascii=False) for call in tools)
            pause_kind: PauseKind = "none" if first else "tool" if kind == "tool" else "person"
            yield TextCall(MAIN, f"{text}assistant: ", content, pause_s, pause_kind, tool if kind == "tool" else "")
            pause_s = sum(call.number("execution_time_seconds", 0.0) for call in tools)
            tool = _tool_name(tools[0]) if tools else ""
            first = False
        kind = role
        text += f"{role}: {content}\n"


def _tool_name(call: Record) -> str:
    return Record.of(f"{call.where}: function", call.data.get("function")).text("name")


def _content(message: Record) -> str:
    """The text of a message, which is a text, a list of parts, or nothing."""
    if not isinstance(message.data.get("content"), list):
        return message.text("content", "")
    return "".join(part.text("text", "") for part in message.records("content"))
