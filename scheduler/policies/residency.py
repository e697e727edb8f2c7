"""Whose working sets are to be in memory: the weighing of pauses, recomputation and room under all that Treadle keeps.

Each program claims the pages of its next step of work: a running call what it holds and will still generate, a waiting
call its whole prompt and output, a program that waits for something outside the pages that its next turn continues.
Claims whose pages are still there go before those that would have to be computed, each lot in the order of programs; a
call that has waited for `STARVE_S` counts among the first. Then there are two walks in one:

- What fits both tiers together is kept in one of them. What does not, is skipped, and may be forgotten.
- Of that, what fits the device is kept there. Only such calls may start.

Keeping c tokens for a pause of r seconds costs r c / C of the time of a memory of C tokens; losing them costs B(c)
seconds to have them again. So a pause is waited out while r < patience * B(c) * C / c, with the costs of loading for
the device if there is a host tier, and those of computing for both together.
"""

from __future__ import annotations

import math

from treadle.scheduler.call import Status
from treadle.scheduler.kv import Lease
from treadle.scheduler.policies.books import Books
from treadle.scheduler.policies.order import OrderPolicy

RECHECK_S = 1.0
STARVE_S = 600.0
OVER_QUOTA, SLEEPER, LATER, HOSTED, KEPT = -0.5, 0.0, 1.0, 2.0, 3.0


class Residency:
    """Decides at each refresh which programs are kept, and gives every lease a value."""

    def __init__(self, books: Books, order: OrderPolicy, patience: float = 1.0) -> None:
        self.patience = patience
        self.admitted: set[str] = set()
        self.valid_until = math.inf
        self._books = books
        self._order = order
        self._values: dict[str, tuple[float, float]] = {}

    def value(self, lease: Lease) -> tuple[float, float]:
        """What a lease is worth: its class, and a number that orders those of one class."""
        return self._values.get(lease.owner, (LATER, 0.0))

    def longest_pause(self, num_tokens: int, *, on_device: bool) -> float:
        """Seconds for which so many tokens are worth keeping, on the device or in any tier."""
        config, costs = self._books.config, self._books.costs
        lost, pages = costs.compute(0, num_tokens), config.num_pages + config.num_host_pages
        if on_device and config.num_host_pages:
            lost, pages = min(lost, costs.load * num_tokens), config.num_pages
        return self.patience * lost * pages * config.page_size / max(1, num_tokens)

    def refresh(self, now: float) -> None:
        """Goes through all claims."""
        books, page = self._books, self._books.config.page_size
        on_device = float(books.config.num_pages)
        anywhere = on_device + books.config.num_host_pages
        self.admitted.clear()
        self._values.clear()
        self.valid_until = math.inf
        programs = sorted(books.programs.values(), key=lambda program: self._order.program_rank(program, now))
        claims: list[tuple[bool, int, int, float, float, Lease]] = []
        for index, program in enumerate(programs):
            for call in program.calls.values():
                if call.status is Status.RUNNING:
                    held = (call.num_tokens + books.expected_output(call)) / page + 1
                    on_device -= held
                    anywhere -= held
            for lease in program.leases.values():
                owner = program.calls.get(lease.owner)
                absent = 2 * self._known_tokens(lease) < lease.num_tokens
                if owner is not None and owner.status is Status.WAITING:
                    need = (owner.num_tokens + books.expected_output(owner)) / page + 1
                    first = absent and now - lease.since <= STARVE_S
                    claims.append((first, index, len(claims), need, 0.0, lease))
                    continue
                pause = books.expected_pause(lease, now)
                if pause > self.longest_pause(lease.num_tokens, on_device=False):
                    self._values[lease.owner] = (SLEEPER, -pause)
                else:
                    claims.append((absent, index, len(claims), lease.num_tokens / page + 1, pause, lease))
                    self.valid_until = now + RECHECK_S
        quota = books.config.tenant_share * (books.config.num_pages + books.config.num_host_pages)
        leased: dict[str, float] = {}
        claims.sort()
        for place, (absent, _, _, need, pause, lease) in enumerate(claims):
            if lease.pause is not None:
                leased[lease.tenant] = leased.get(lease.tenant, 0.0) + need
            if leased.get(lease.tenant, 0.0) > quota and lease.pause is not None:
                self._values[lease.owner] = (OVER_QUOTA, -place)
            elif need > anywhere:
                self._values[lease.owner] = (LATER if absent else HOSTED, -place)
                if not absent:
                    anywhere = on_device = 0.0
            else:
                anywhere -= need
                if pause > self.longest_pause(lease.num_tokens, on_device=True):
                    self._values[lease.owner] = (HOSTED, -pause)
                elif need > on_device:
                    self._values[lease.owner] = (HOSTED, -place)
                else:
                    on_device -= need
                    self._values[lease.owner] = (KEPT, -place)
                    if lease.pause is None:
                        self.admitted.add(lease.owner)

    def _known_tokens(self, lease: Lease) -> int:
        """Tokens of the owner's whose KV is in one of the tiers."""
        node, tokens = lease.node, 0
        while node.parent is not None:
            tokens += len(node.key)
            node = node.parent
        return tokens
