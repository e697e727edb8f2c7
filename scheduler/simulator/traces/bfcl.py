"""BFCL's multi-turn tasks: what people ask, and the calls that answer it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from treadle.scheduler.simulator.traces.files import Line, Record, TraceError, lines
from treadle.scheduler.simulator.traces.text import CHARS_PER_TOKEN, TextCall, TextPrograms
from treadle.scheduler.simulator.workload import PauseKind, ProgramSpec

RESULT_TOKENS = 32
DOCUMENTS = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "TwitterAPI": "posting_api",
    "VehicleControlAPI": "vehicle_control",
}


def programs(tasks: Iterable[Line], path: Path, salt: str) -> tuple[ProgramSpec, ...]:
    """Tasks of ShishirPatil/gorilla (`bfcl_eval/data/BFCL_v4_multi_turn_base.json`).

    The expected calls are read from `possible_answer/` beside the file, under the same name, and the descriptions of
    the tools, which begin every prompt, from `multi_turn_func_doc/`. Each expected call is one call of the model; a
    turn ends with one more, its answer to the person. The data has no tool results, no answers and no times: results
    and answers are taken to be 32 tokens each, and pauses to be 0 s.
    """
    answers = {
        record.text("id"): record for record in map(Record.parse, lines(path.parent / "possible_answer" / path.name))
    }
    documents: dict[str, list[Record]] = {}
    collected = TextPrograms("bfcl", salt)
    for line in tasks:
        task = Record.parse(line)
        name = task.text("id")
        if name not in answers:
            raise TraceError(f"{task.where}: possible_answer/{path.name} has no answer to {name}")
        begin = _descriptions(task, path.parent / "multi_turn_func_doc", documents)
        collected.add(name, 0.0, _calls(task, answers[name], begin))
    return collected.programs()


def _descriptions(task: Record, folder: Path, documents: dict[str, list[Record]]) -> str:
    """The tools of a task, one a line; `documents` keeps what was read before."""
    excluded = task.items("excluded_function", optional=True)
    text = ""
    for tools in task.items("involved_classes"):
        if tools not in DOCUMENTS:
            raise TraceError(f"{task.where}: involved_classes: no file is known for {tools!r}")
        if tools not in documents:
            documents[tools] = [Record.parse(line) for line in lines(folder / f"{DOCUMENTS[tools]}.json")]
        text += "".join(f"{tool.data}\n" for tool in documents[tools] if tool.text("name") not in excluded)
    return text


def _calls(task: Record, answer: Record, text: str) -> Iterator[TextCall]:
    questions, expected = task.items("question"), answer.items("ground_truth")
    if len(questions) != len(expected):
        raise TraceError(f"{task.where}: {len(questions)} turns, but answers to {len(expected)}")
    kind: PauseKind = "none"
    for turn, (messages, calls) in enumerate(zip(questions, expected, strict=True)):
        if not isinstance(messages, list) or not isinstance(calls, list):
            raise TraceError(f"{task.where}: turn {turn} is not a list of messages with a list of calls")
        for message in (Record.of(f"{task.where}: question", message) for message in messages):
            text += f"{message.text('role')}: {message.text('content')}\n"
        tool = ""
        for step, call in enumerate([*map(str, calls), _filler(f"answer {turn}")]):
            yield TextCall("main", f"{text}assistant: ", call, 0.0, kind, tool)
            text += f"assistant: {call}\n"
            if step < len(calls):
                text += f"tool: {_filler(f'result {turn}.{step}')}\n"
                kind, tool = "tool", call.partition("(")[0]
        kind = "person"


def _filler(text: str) -> str:
    return text.ljust(RESULT_TOKENS * CHARS_PER_TOKEN, ".")
