"""A turn with tool calls: a machine that hands each stretch of the turn to the grammar it belongs to.

        +-> FREE text --<tool_call>--> HEAD: {"name": ... --tool known--> CALL: arguments, closing --+
        |                                ^                                                           |
        +---- free text after a call ----|----------------------------------------- </tool_call> ----+
                                         +---- LEAD: only the opening tag may come

Each tool has its own compiled grammar, which other turns share, and begins right after the opening tag. While the tags
or names that tools have in common are written, no grammar runs: the legal tokens follow from the texts themselves, and
are worked out once for each position. No token reaches over the end of a tag, so every border falls between tokens.
"""

from __future__ import annotations

import enum
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from treadle.grammar.constraints import ToolTurn
from treadle.grammar.matcher import ContentGrammar, ContentMatcher, Grammar, Matcher
from treadle.grammar.tool_text import CLOSE, OPEN, ToolCall, call_head
from treadle.grammar.vocabulary import Mask, Vocabulary, has

MAX_MASKS = 64

_OPEN = OPEN.encode()
# What a second call begins with, where no free text may stand between calls.
_NEXT = b"\n" + _OPEN
assert _OPEN.count(_OPEN[:1]) == 1, "how far the opening tag is written must follow from the last match alone"


class Phase(enum.Enum):
    """What the turn is writing. START is LEAD or ANSWER, undecided."""

    FREE = enum.auto()
    START = enum.auto()
    LEAD = enum.auto()
    HEAD = enum.auto()
    CALL = enum.auto()
    CLOSING = enum.auto()
    ANSWER = enum.auto()
    ENDED = enum.auto()
    DONE = enum.auto()


@dataclass(frozen=True, slots=True)
class State:
    """Where a turn stands. `written` is how much of the opening tag, or which part of the call's head, is there."""

    phase: Phase
    written: bytes = b""
    lead: bytes = b""
    tool: int | None = None
    call_start: int = 0
    calls: tuple[ToolCall, ...] = ()
    inner: ContentMatcher | None = None


@dataclass(slots=True)
class Step:
    """An accepted token: the state before it, its text, and the inner matcher that it moved, if any."""

    before: State
    text: bytes
    moved: ContentMatcher | None = None


class ToolTurnGrammar(Grammar):
    """The grammar of a `ToolTurn`: one grammar for each tool, and perhaps one for the answer."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        turn: ToolTurn,
        tools: tuple[ContentGrammar, ...],
        answer: ContentGrammar | None,
    ) -> None:
        self.turn = turn
        self.vocabulary = vocabulary
        self.tools = tools
        self.answer = answer
        self.names = tuple(tool.name for tool in turn.tools)
        self.heads = tuple(call_head(name).encode() for name in self.names)
        self.unenforced = tuple(
            f"/tools/{i}/parameters{pointer}" for i, tool in enumerate(tools) for pointer in tool.unenforced
        ) + tuple(f"/answer{pointer}" for pointer in (answer.unenforced if answer is not None else ()))
        self.parts = tools if answer is None else (*tools, answer)
        self.num_bytes = 4_096 + sum(map(len, self.heads)) + MAX_MASKS * vocabulary.size // 8
        self._masks: OrderedDict[tuple[str, bytes], Mask] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self) -> ToolTurnMatcher:
        if self.turn.mode == "required":
            return ToolTurnMatcher(self, State(Phase.LEAD, lead=_OPEN))
        if self.answer is not None:
            return ToolTurnMatcher(self, State(Phase.START, lead=_OPEN, inner=self.answer.matcher()))
        return ToolTurnMatcher(self, State(Phase.FREE))

    def mask(self, kind: str, written: bytes, work: Callable[[], Mask]) -> Mask:
        """A mask that depends only on what is written, worked out once."""
        with self._lock:
            found = self._masks.get((kind, written))
            if found is not None:
                self._masks.move_to_end((kind, written))
                return found
        mask = work()
        with self._lock:
            self._masks[kind, written] = mask
            if len(self._masks) > MAX_MASKS:
                self._masks.popitem(last=False)
        return mask

    def free_mask(self, written: bytes) -> Mask:
        """All text, but nothing that runs past the end of the opening tag, `written` of which is there already."""
        vocabulary = self.vocabulary

        def work() -> Mask:
            rest = _OPEN[len(written) :]
            crossing = [i for text, i in vocabulary.with_prefix(rest) if text != rest]
            return vocabulary.text_mask & ~vocabulary.mask([*crossing, *vocabulary.containing_tag])

        return self.mask("free", written, work)

    def lead_mask(self, rest: bytes, *, can_end: bool) -> Mask:
        """Only `rest`, which ends with the opening tag or is the end of it, and stop tokens if the turn may end."""

        def work() -> Mask:
            return self.vocabulary.mask([*self.lead_ids(rest), *(self.vocabulary.stop_ids if can_end else ())])

        return self.mask("lead-or-end" if can_end else "lead", rest, work)

    def lead_ids(self, rest: bytes) -> Sequence[int]:
        """The tokens with which `rest` may go on. Where the opening tag is a token, it stands for all of the tag."""
        if not self.vocabulary.open_ids:
            return self.vocabulary.prefixes_of(rest)
        return self.vocabulary.prefixes_of(rest[: -len(_OPEN)]) or self.vocabulary.open_ids

    def head_mask(self, written: bytes) -> Mask:
        """What may follow `written` in the head of a call, including tokens that reach into a tool's arguments."""
        vocabulary = self.vocabulary

        def work() -> Mask:
            ids: set[int] = set()
            for i in self.candidates(written):
                rest = self.heads[i][len(written) :]
                ids.update(vocabulary.prefixes_of(rest))
                reaching = [token_id for text, token_id in vocabulary.with_prefix(rest) if len(text) > len(rest)]
                if reaching:
                    mask = torch.zeros(1, -(-vocabulary.size // 32), dtype=torch.int32)
                    self.enter(i, written).fill(mask, 0)
                    ids.update(token_id for token_id in reaching if has(mask[0], token_id))
            return vocabulary.mask(ids)

        return self.mask("head", written, work)

    def candidates(self, written: bytes) -> list[int]:
        """The tools whose head begins with `written`."""
        return [i for i, head in enumerate(self.heads) if head.startswith(written)]

    def enter(self, tool: int, written: bytes) -> ContentMatcher:
        """A matcher of one tool's call, with `written` behind it."""
        matcher = self.tools[tool].matcher()
        entered = not written or matcher.accept_text(written)
        assert entered, f"the head of {self.names[tool]!r} is not in its own grammar"
        return matcher


class ToolTurnMatcher(Matcher):
    """A matcher over a `ToolTurnGrammar`. Every accepted token leaves the state before it, to roll back into."""

    def __init__(self, grammar: ToolTurnGrammar, state: State) -> None:
        self._grammar = grammar
        self._vocabulary = grammar.vocabulary
        self._state = state
        self._past: list[Step] = []

    def accept(self, token_id: int) -> bool:
        assert 0 <= token_id < self._vocabulary.size, f"token {token_id} is not in the vocabulary"
        before = self._state
        step = Step(before, self._vocabulary.content_bytes[token_id])
        self._past.append(step)
        after = self._ending(before) if token_id in self._vocabulary.stop_ids else self._writing(step, token_id)
        if after is None:
            self._past.pop()
            return False
        self._state = after
        return True

    def _ending(self, state: State) -> State | None:
        return replace(state, phase=Phase.DONE, inner=None) if self.can_end else None

    def _writing(self, step: Step, token_id: int) -> State | None:
        """The state after a token of text, or None if it is not legal."""
        state = step.before
        match state.phase:
            case Phase.FREE:
                return self._write_free(state, step.text, token_id)
            case Phase.START:
                return self._write_lead(state, step.text, token_id) or self._write_answer(step, token_id)
            case Phase.LEAD:
                return self._write_lead(state, step.text, token_id)
            case Phase.HEAD:
                return self._write_head(state, step.text, token_id)
            case Phase.CALL:
                return self._write_call(step, token_id)
            case Phase.CLOSING:
                return self._close(state) if token_id == self._vocabulary.close_id else None
            case Phase.ANSWER:
                return self._write_answer(step, token_id)
        return None

    def _write_free(self, state: State, text: bytes, token_id: int) -> State | None:
        if token_id in self._vocabulary.open_ids:
            return self._open(state)
        together = state.written + text
        found = together.find(_OPEN)
        if not text or 0 <= found < len(together) - len(_OPEN):
            return None
        if found >= 0:
            return self._open(state)
        length = min(len(together), len(_OPEN) - 1)
        while not together.endswith(_OPEN[:length]):
            length -= 1
        return state if state.written == _OPEN[:length] else replace(state, written=_OPEN[:length])

    def _write_lead(self, state: State, text: bytes, token_id: int) -> State | None:
        if token_id not in self._grammar.lead_ids(state.lead):
            return None
        rest = b"" if token_id in self._vocabulary.open_ids else state.lead[len(text) :]
        return replace(state, phase=Phase.LEAD, lead=rest, inner=None) if rest else self._open(state)

    def _write_answer(self, step: Step, token_id: int) -> State | None:
        assert step.before.inner is not None
        if not step.before.inner.accept(token_id):
            return None
        step.moved = step.before.inner
        return replace(step.before, phase=Phase.ANSWER)

    def _open(self, state: State) -> State:
        """A call begins after the token under way."""
        head = State(Phase.HEAD, call_start=len(self._past), calls=state.calls)
        return self._enter(head, 0, b"") if len(self._grammar.heads) == 1 else head

    def _write_head(self, state: State, text: bytes, token_id: int) -> State | None:
        grammar, written = self._grammar, state.written + text
        if not text:
            return None
        candidates = grammar.candidates(written)
        if len(candidates) > 1:
            return replace(state, written=written)
        if candidates:
            return self._enter(state, candidates[0], written)
        for tool in grammar.candidates(state.written):
            if written.startswith(grammar.heads[tool]):
                inside = self._enter(state, tool, state.written)
                assert inside.inner is not None
                return inside if inside.inner.accept(token_id) else None
        return None

    def _enter(self, state: State, tool: int, written: bytes) -> State:
        return replace(state, phase=Phase.CALL, tool=tool, written=b"", inner=self._grammar.enter(tool, written))

    def _write_call(self, step: Step, token_id: int) -> State | None:
        state = step.before
        assert state.inner is not None
        if not state.inner.accept(token_id):
            return None
        step.moved = state.inner
        if not state.inner.can_end:
            return state
        return self._close(state) if self._vocabulary.close_id is None else replace(state, phase=Phase.CLOSING)

    def _close(self, state: State) -> State:
        """The call is complete: what may follow depends on the turn."""
        assert state.tool is not None
        body = b"".join(step.text for step in self._past[state.call_start :]).removesuffix(CLOSE.encode())
        arguments = body[len(self._grammar.heads[state.tool]) : -len(b"}\n")].decode()
        calls = (*state.calls, ToolCall(len(state.calls), self._grammar.names[state.tool], arguments))
        turn = self._grammar.turn
        if not turn.parallel:
            return State(Phase.ENDED, calls=calls)
        if turn.mode == "required" or turn.answer is not None:
            return State(Phase.LEAD, lead=_NEXT, calls=calls)
        return State(Phase.FREE, calls=calls)

    def fill(self, bitmask: torch.Tensor, row: int) -> bool:
        state, grammar = self._state, self._grammar
        match state.phase:
            case Phase.FREE:
                mask = grammar.free_mask(state.written)
            case Phase.LEAD:
                mask = grammar.lead_mask(state.lead, can_end=self.can_end)
            case Phase.HEAD:
                mask = grammar.head_mask(state.written)
            case Phase.CLOSING:
                assert self._vocabulary.close_id is not None
                mask = self._vocabulary.mask([self._vocabulary.close_id])
            case Phase.ENDED:
                mask = self._vocabulary.mask(self._vocabulary.stop_ids)
            case Phase.DONE:
                return False
            case _:
                assert state.inner is not None
                filled = state.inner.fill(bitmask, row)
                assert filled, "no content admits every token, for special ones never are"
                if state.phase is Phase.START:
                    bitmask[row] |= grammar.lead_mask(state.lead, can_end=False)
                return True
        bitmask[row] = mask
        return True

    def rollback(self, count: int) -> None:
        assert 0 <= count <= len(self._past), f"{len(self._past)} tokens cannot be rolled back by {count}"
        for _ in range(count):
            step = self._past.pop()
            if step.moved is not None:
                step.moved.rollback(1)
            self._state = step.before

    def fork(self) -> ToolTurnMatcher:
        forks: dict[int, ContentMatcher] = {}

        def fork(inner: ContentMatcher) -> ContentMatcher:
            if id(inner) not in forks:
                forks[id(inner)] = inner.fork()
            return forks[id(inner)]

        def copy(state: State) -> State:
            return state if state.inner is None else replace(state, inner=fork(state.inner))

        other = ToolTurnMatcher(self._grammar, copy(self._state))
        other._past = [
            Step(copy(step.before), step.text, None if step.moved is None else fork(step.moved)) for step in self._past
        ]
        return other

    def forced(self) -> str:
        state = self._state
        match state.phase:
            case Phase.LEAD if not self.can_end:
                return state.lead.decode()
            case Phase.HEAD:
                heads = [self._grammar.heads[i] for i in self._grammar.candidates(state.written)]
                return _common_prefix(heads)[len(state.written) :].decode(errors="ignore")
            case Phase.CALL | Phase.ANSWER:
                assert state.inner is not None
                return state.inner.forced()
            case Phase.CLOSING:
                return CLOSE
        return ""

    @property
    def can_end(self) -> bool:
        state = self._state
        if state.phase is Phase.ANSWER:
            return state.inner is not None and state.inner.can_end
        return state.phase in (Phase.FREE, Phase.ENDED) or (state.phase is Phase.LEAD and state.lead == _NEXT)

    @property
    def is_done(self) -> bool:
        return self._state.phase is Phase.DONE

    @property
    def tool_name(self) -> str | None:
        return None if self._state.tool is None else self._grammar.names[self._state.tool]

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        return self._state.calls


def _common_prefix(texts: Sequence[bytes]) -> bytes:
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]
