"""Claude Code sessions: block hashes, sizes and pauses of coding agents and their sub-agents."""

from __future__ import annotations

from collections.abc import Iterable

from treadle.scheduler.simulator.traces.files import Line, Record, TraceError
from treadle.scheduler.simulator.workload import Blocks, CallSpec, PauseKind, ProgramSpec, close_prompts

BLOCK_TOKENS = 64
MAIN = "main"

# Sizes of pauses are whole seconds in most rows, so a wait for an agent may look this much shorter than the agent ran.
ROUNDING_S = 2.0


def programs(lines: Iterable[Line]) -> tuple[ProgramSpec, ...]:
    """Programs of callanjfox/kv-cache-tester (`traces/*.json`), one a line, block lists written as differences.

    A request's blocks are the first `keep` of the request before it in its list, then the runs of `new`; they are full
    blocks of 64 tokens. A sub-agent is an entry of its parent's list with requests of its own.

    Programs run one call after the other here, so a sub-agent's calls stand where it stands in its parent's list, even
    if several ran at once. Its first call does not pause. The parent's next call then waits for what is left of its
    pause after the longest of the agents, and the pause is the agents'; if they ran longer than the pause, as those in
    the background do, the parent did not wait for them and the pause is its own.

    Programs share no block: the ids are local to one. All start at 0. The models of calls are left out. A request that
    generated nothing counts as one token.
    """
    return tuple(_program(Record.parse(line)) for line in lines)


def _program(record: Record) -> ProgramSpec:
    if record.integer("block_size") != BLOCK_TOKENS:
        raise record.error("block_size", str(BLOCK_TOKENS))
    name = record.text("id")
    calls = _main_calls(record)
    if not calls:
        raise TraceError(f"{record.where}: a program without calls")
    fresh_id = max(start + count for call in calls for start, count in (*call.prompt.runs, (0, 0)))
    try:
        return ProgramSpec(name, "claude-code", 0.0, close_prompts(calls, BLOCK_TOKENS, fresh_id), name)
    except ValueError as error:
        raise TraceError(f"{record.where}: {error}") from error


def _main_calls(record: Record) -> list[CallSpec]:
    calls: list[CallSpec] = []
    agents: list[float] = []
    before: Record | None = None
    prompt = Blocks()
    for request in record.records("requests"):
        if request.text("type") == "subagent":
            calls += _agent_calls(request)
            agents.append(_agent_seconds(request))
            continue
        prompt = _prompt(request, prompt)
        pause_s, kind = _pause(request, before)
        longest = max(agents, default=0.0)
        if agents and longest <= pause_s + ROUNDING_S:
            pause_s, kind = max(0.0, pause_s - longest), "agent"
        calls.append(_call(request, MAIN, prompt, pause_s, kind))
        agents, before = [], request
    return calls


def _agent_calls(agent: Record) -> list[CallSpec]:
    calls: list[CallSpec] = []
    before: Record | None = None
    prompt = Blocks()
    for request in agent.records("requests"):
        prompt = _prompt(request, prompt)
        calls.append(_call(request, agent.text("agent_id"), prompt, *_pause(request, before)))
        before = request
    return calls


def _agent_seconds(agent: Record) -> float:
    """How long an agent ran; where that was not recorded, to the end of its last request."""
    last = max(
        (request.number("t") + request.number("api_time", 0.0) for request in agent.records("requests")), default=0
    )
    return agent.number("duration_ms", last * 1000) / 1000


def _prompt(request: Record, before: Blocks) -> Blocks:
    keep = request.integer("keep")
    if keep > len(before):
        raise TraceError(f"{request.where}: keeps {keep} blocks of a prompt that has {len(before)}")
    runs = request.runs("new")
    try:
        return before.part(0, keep) + Blocks.from_runs(runs)
    except ValueError as error:
        raise TraceError(f"{request.where}: {error}") from error


def _pause(request: Record, before: Record | None) -> tuple[float, PauseKind]:
    """The client's pause before a request, and what for.

    A streamed request may list the kinds of all that it sends, history included; then how the request before it ended
    says who was waited for.
    """
    if before is None:
        return 0.0, "none"
    elapsed = max(0.0, request.number("t") - before.number("t") - before.number("api_time", 0.0))
    by_tool = "tool_result" in request.items("input_types") and before.text("stop", "") != "end_turn"
    return request.number("think_time", elapsed), "tool" if by_tool else "person"


def _call(request: Record, stream: str, prompt: Blocks, pause_s: float, kind: PauseKind) -> CallSpec:
    return CallSpec(stream, prompt, max(1, request.integer("in")), max(1, request.integer("out")), pause_s, kind)
