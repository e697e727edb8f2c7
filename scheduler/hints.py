"""Hints: what the owner of a program says of its pages while none of its calls runs, weighed against everybody else."""

from __future__ import annotations

import math

from treadle.scheduler.call import Program
from treadle.scheduler.commands import Hint, HintAnswered, HintOutcome
from treadle.scheduler.kv import Lease
from treadle.scheduler.leases import Leases
from treadle.scheduler.memory import CallMemory
from treadle.scheduler.policies import Books
from treadle.scheduler.policies.retention import RetentionPolicy

MAX_RETAIN_S = 3600.0
RETAIN_SHARE = 0.5
"""Share of all pages that hints may retain. What leases keep beyond it is weighed as if nobody had asked."""


class Hints:
    """Answers hints. A hint weighs leases and locks nothing, so a wrong one costs time, and never a result."""

    def __init__(self, leases: Leases, memory: CallMemory, books: Books, retention: RetentionPolicy) -> None:
        self._leases = leases
        self._memory = memory
        self._books = books
        self._retention = retention

    def answer(self, program: Program, hint: Hint, now: float) -> HintAnswered:
        """Does what a hint asks for, as far as can be."""
        resting = [lease for lease in program.leases.values() if lease.pause is not None]
        if hint.action == "release":
            return self._release(program, hint, resting, now)
        if not resting:
            return answered(hint, "dropped", reason="no call of the program has come to rest")
        if not self._retention.heeds_hints:
            return answered(hint, "dropped", reason=f"retention policy {self._books.config.retention!r} heeds no hints")
        if hint.action == "demote":
            for lease in resting:
                lease.is_demoted, lease.retained_until = True, -math.inf
            return answered(hint, "granted", sum(lease.num_known_tokens for lease in resting))
        return self._retain(hint, resting, now)

    def _retain(self, hint: Hint, resting: list[Lease], now: float) -> HintAnswered:
        if not hint.seconds > 0:
            return answered(hint, "dropped", reason=f"cannot retain for {hint.seconds} seconds; give a number above 0")
        seconds, left = min(hint.seconds, MAX_RETAIN_S), self._room(resting, now)
        retained, refused = 0, 0
        for lease in reversed(resting):
            tokens = lease.num_known_tokens
            if tokens > left:
                refused += tokens
                continue
            lease.is_demoted, lease.retained_until = False, now + seconds
            left -= tokens
            retained += tokens
        if refused:
            reason = f"{refused} tokens are beyond the {RETAIN_SHARE:.0%} of all pages that hints may retain"
            return answered(hint, "clipped" if retained else "dropped", retained, seconds if retained else 0.0, reason)
        if seconds < hint.seconds:
            return answered(hint, "clipped", retained, seconds, f"pages are retained for at most {MAX_RETAIN_S:g} s")
        return answered(hint, "granted", retained, seconds)

    def _room(self, resting: list[Lease], now: float) -> int:
        """Tokens that hints may still retain, not counting what they retain of these leases already."""
        config, own = self._books.config, {lease.owner for lease in resting}
        others = sum(
            lease.num_known_tokens
            for lease in self._books.leases.values()
            if lease.retained_until > now and lease.owner not in own
        )
        return int(RETAIN_SHARE * (config.num_pages + config.num_host_pages) * config.page_size) - others

    def _release(self, program: Program, hint: Hint, resting: list[Lease], now: float) -> HintAnswered:
        tokens = sum(lease.num_known_tokens for lease in resting)
        self._leases.drop_resting(program)
        for call_id in sorted(program.tails):
            self._memory.forget_tail(call_id)
        program.tails.clear()
        if not program.calls:
            self._retention.resumed(program, now)
        return answered(hint, "granted", tokens)


def answered(
    hint: Hint, outcome: HintOutcome, num_tokens: int = 0, seconds: float = 0.0, reason: str = ""
) -> HintAnswered:
    """The answer to a hint."""
    return HintAnswered(hint.request_id, hint.program_id, outcome, num_tokens, seconds, reason)
