"""Prompts known as text: tokens are counted as four characters each, and blocks shared where the text is the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from treadle.scheduler.simulator.workload import Blocks, CallSpec, PauseKind, ProgramSpec, close_prompts

CHARS_PER_TOKEN = 4
BLOCK_TOKENS = 16


def count_tokens(text: str) -> int:
    """Tokens of a text, at four characters each, and at least one."""
    return max(1, -(-len(text) // CHARS_PER_TOKEN))


@dataclass(slots=True, eq=False)
class TextBlocks:
    """Block ids of texts. A block's id stands for it and for all before it, so texts share ids as far as they agree."""

    _ids: dict[tuple[int, str], int] = field(default_factory=dict)

    @property
    def next_id(self) -> int:
        """An id that no block has yet."""
        return len(self._ids)

    def full_blocks(self, text: str) -> Blocks:
        """The blocks that a text fills."""
        size, before, ids = BLOCK_TOKENS * CHARS_PER_TOKEN, -1, []
        for start in range(0, len(text) - size + 1, size):
            before = self._ids.setdefault((before, text[start : start + size]), len(self._ids))
            ids.append(before)
        return Blocks.from_ids(ids)


@dataclass(frozen=True, slots=True)
class TextCall:
    """A call whose prompt and output are text; the rest is as in `CallSpec`."""

    stream: str
    prompt: str
    output: str
    pause_s: float = 0.0
    pause_kind: PauseKind = "none"
    tool: str = ""


@dataclass(slots=True, eq=False)
class TextPrograms:
    """Collects programs of text calls, which share blocks with each other."""

    kind: str
    salt: str
    _blocks: TextBlocks = field(default_factory=TextBlocks)
    _open: list[tuple[str, float, list[CallSpec]]] = field(default_factory=list)

    def add(self, program_id: str, start_s: float, calls: Iterable[TextCall]) -> None:
        """Adds a program."""
        self._open.append((program_id, start_s, [self._call(call) for call in calls]))

    def _call(self, call: TextCall) -> CallSpec:
        return CallSpec(
            call.stream,
            self._blocks.full_blocks(call.prompt),
            count_tokens(call.prompt),
            count_tokens(call.output),
            call.pause_s,
            call.pause_kind,
            call.tool,
        )

    def programs(self) -> tuple[ProgramSpec, ...]:
        """The programs, in the order in which they were added."""
        fresh_id, programs = self._blocks.next_id, []
        for program_id, start_s, calls in self._open:
            closed = close_prompts(calls, BLOCK_TOKENS, fresh_id)
            fresh_id += len(closed)
            programs.append(ProgramSpec(program_id, self.kind, start_s, closed, self.salt))
        return tuple(programs)
