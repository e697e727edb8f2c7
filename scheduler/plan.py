"""The contract between scheduler and engine: a `StepPlan` goes in, a `StepResult` comes out."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

from treadle.scheduler.commands import TokenLogprob


@dataclass(slots=True)
class Row:
    """One call's share of a step: compute the tokens `start .. start + count`, and sample the next one if asked.

    There is no prefill and no decode: a decoding call is a row with a count of one.
    """

    call_id: str
    slot: int
    start: int
    count: int
    sample: bool

    @property
    def end(self) -> int:
        """Position after the last computed token: where the sampled token goes."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class TokenWrite:
    """Known tokens for `token_pool[slot, position:]`."""

    slot: int
    position: int
    token_ids: array[int]


@dataclass(frozen=True, slots=True)
class PageWrite:
    """Entries for `page_table[slot, index:]`."""

    slot: int
    index: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the engine does in one step: save, copy, write tokens and page entries, compute and sample; load meanwhile.

    Rows with a count of one come first. Copies read all their sources before they write. A plan that only moves pages
    has no rows.

    Attributes:
        saves: Pairs of a page and the slot of host memory that it is copied to.
        loads: Pairs of a slot of host memory and the page that it is copied to; no row of this step reads that.
        repeat: How often the plan could be carried out in a row, each row one token further each time, with nothing to
            decide in between. Whoever simulates steps may do that; see `StepResult.repeated`.
        valid_until: When a decision is due that only time brings.
    """

    step_id: int
    rows: tuple[Row, ...]
    copies: tuple[tuple[int, int], ...] = ()
    token_writes: tuple[TokenWrite, ...] = ()
    page_writes: tuple[PageWrite, ...] = ()
    saves: tuple[tuple[int, int], ...] = ()
    loads: tuple[tuple[int, int], ...] = ()
    repeat: int = 1
    valid_until: float = math.inf

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return sum(row.count for row in self.rows)


@dataclass(frozen=True, slots=True)
class RowOutput:
    """What a row sampled: one token, or one for each repetition. `stop` says that the text reached a stop string."""

    call_id: str
    token_ids: tuple[int, ...]
    text: str = ""
    stop: bool = False
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of a plan: a token for each sampling row, or the reason why a call's row could not be computed.

    `repeated` is how often the plan was carried out, at most its `repeat`; `duration` is that of all together.
    """

    step_id: int
    duration: float
    outputs: tuple[RowOutput, ...]
    failed: tuple[tuple[str, str], ...] = ()
    repeated: int = 1
