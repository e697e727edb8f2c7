"""Where the tokens and the time of a program went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from treadle.scheduler import PathStep, ProgramEnded, Usage


@dataclass(frozen=True, slots=True)
class Account:
    """The account of a program, closed when it ended.

    Attributes:
        duration_s: From its beginning to its end.
        calls, tools, nodes: How many calls of the model, tool runs, and nodes of the graph it had.
        usage: Tokens and seconds in the engine.
        tool_wait_s: Sum of the time its tools ran.
        critical_path: The chain of nodes that its end waited for, with the seconds spent on each.
        first_tool_lead_s: The longest time by which a tool started before the turn that called it was complete.
    """

    duration_s: float
    calls: int
    tools: int
    nodes: int
    usage: Usage
    tool_wait_s: float
    critical_path: tuple[PathStep, ...]
    first_tool_lead_s: float = 0.0

    @classmethod
    def of(cls, ended: ProgramEnded, tools: int, first_tool_lead_s: float) -> Account:
        return cls(
            ended.duration_s,
            ended.calls,
            tools,
            ended.nodes,
            ended.usage,
            ended.tool_wait_s,
            ended.critical_path,
            first_tool_lead_s,
        )

    def to_json(self) -> Mapping[str, Any]:
        """Plain values for `json.dumps`."""
        fields = asdict(self)
        usage = fields.pop("usage")
        return {**fields, **usage}

    def lines(self) -> Iterator[str]:
        """For people."""
        usage = self.usage
        yield f"{self.calls} calls, {self.tools} tool runs in {self.duration_s:.2f} s, {usage.steps} rows of steps"
        yield (
            f"prompt tokens: {usage.prefilled} computed, {usage.cached} from the cache, "
            f"{usage.re_prefilled} computed again; {usage.decoded} generated"
        )
        yield (f"queued {usage.queued_s:.2f} s, engine {usage.service_s:.2f} s, tools {self.tool_wait_s:.2f} s")
        path = " -> ".join(f"{step.name} {step.seconds:.2f} s" for step in self.critical_path)
        yield f"critical path: {path or 'nothing ran'}"
