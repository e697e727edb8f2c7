"""Whose working sets are to be in memory: the weighing of pauses, recomputation and room under all that Treadle keeps.

Each program claims the pages of its next step of work: a running call what it holds and will still generate, a waiting
call its whole prompt and output, a program that waits for something outside the pages that its next turn continues.
What several claims share is charged to the first of them.
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
from collections.abc import Iterator
from typing import TypeAlias

from treadle.scheduler.kv import Lease, Node
from treadle.scheduler.policies.books import Books
from treadle.scheduler.policies.order import OrderPolicy, Rank

_Claim: TypeAlias = tuple[Rank, int, float, float, Lease]
"""Rank of the program, a number that settles ties, pages still to be computed, expected pause, lease."""

RECHECK_S = 1.0
MOST_SKIPPED = 64
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
        self._leased: dict[str, float] = {}
        self._on_device = _Budget(0, 1)
        self._anywhere = _Budget(0, 1)
        self._place = 0

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
        self._on_device = _Budget(books.config.num_pages, page)
        self._anywhere = _Budget(books.config.num_pages + books.config.num_host_pages, page)
        self._leased.clear()
        self._values.clear()
        self.admitted.clear()
        self.valid_until = math.inf
        for call in books.roster.running:
            private = (call.num_tokens + books.expected_output(call)) / page + 1 - call.num_tree_pages
            self._on_device.take(private, call.node)
            self._anywhere.take(private, call.node)
        present: list[_Claim] = []
        absent: list[_Claim] = []
        for lease in books.leases.values():
            known = lease.num_known_tokens
            is_present = 2 * known >= lease.num_tokens
            if lease.pause is None:
                if is_present or now - lease.since > STARVE_S:
                    present.append(self._claim(lease, 0.0, now))
            elif known:
                pause = books.expected_pause(lease, now)
                if pause > self.longest_pause(lease.num_tokens, on_device=False):
                    self._values[lease.owner] = (SLEEPER, -pause)
                else:
                    (present if is_present else absent).append(self._claim(lease, pause, now))
                    self.valid_until = now + RECHECK_S
        present.sort()
        for _, place, need, pause, lease in present:
            self._settle(lease, need, pause, place, is_present=True)
        self._admit_absent(now)
        for _, place, need, pause, lease in sorted(absent):
            self._settle(lease, need, pause, place, is_present=False)

    def _claim(self, lease: Lease, pause: float, now: float) -> _Claim:
        books, page = self._books, self._books.config.page_size
        program = books.programs[lease.program_id]
        tokens = float(lease.num_tokens - lease.num_known_tokens)
        if lease.pause is None:
            tokens += books.expected_output(program.calls[lease.owner])
        # Leases come in the order in which they were granted, which settles equal ranks.
        self._place += 1
        return self._order.program_rank(program, now), self._place, tokens / page + 1, pause, lease

    def _admit_absent(self, now: float) -> None:
        """Lets those begin for whom there is room left, and looks past a few for whom there is none."""
        skipped = 0
        for call in self._books.roster.waiting(now):
            if self._on_device.left < 1 or skipped == MOST_SKIPPED:
                return
            lease = self._books.leases[call.id]
            if call.id not in self._values:
                _, place, need, pause, _ = self._claim(lease, 0.0, now)
                self._settle(lease, need, pause, place, is_present=False)
                skipped += call.id not in self.admitted

    def _settle(self, lease: Lease, private: float, pause: float, place: int, *, is_present: bool) -> None:
        """Says where the pages of a lease are to be, and takes their room."""
        config = self._books.config
        need = self._anywhere.cost(private, lease.node)
        if lease.pause is not None:
            leased = self._leased[lease.tenant] = self._leased.get(lease.tenant, 0.0) + need
            if leased > config.tenant_share * (config.num_pages + config.num_host_pages):
                self._values[lease.owner] = (OVER_QUOTA, -place)
                return
        if need > self._anywhere.left:
            self._values[lease.owner] = (HOSTED if is_present else LATER, -place)
            if is_present:
                self._anywhere.left = self._on_device.left = 0.0
            return
        self._anywhere.take(private, lease.node)
        if pause > self.longest_pause(lease.num_tokens, on_device=True):
            self._values[lease.owner] = (HOSTED, -pause)
        elif self._on_device.cost(private, lease.node) > self._on_device.left:
            self._values[lease.owner] = (HOSTED, -place)
        else:
            self._on_device.take(private, lease.node)
            self._values[lease.owner] = (KEPT, -place)
            if lease.pause is None:
                self.admitted.add(lease.owner)


class _Budget:
    """Pages that are left of a memory. A node that several claims need is taken once."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.left = float(num_pages)
        self._page_size = page_size
        self._taken: set[Node] = set()

    def cost(self, private: float, node: Node | None) -> float:
        """What a claim would take: its private pages, and those from the root to a node that nobody took before."""
        return private + sum(len(part.key) for part in self._untaken(node)) / self._page_size

    def take(self, private: float, node: Node | None) -> None:
        """Takes that."""
        self.left -= self.cost(private, node)
        self._taken.update(self._untaken(node))

    def _untaken(self, node: Node | None) -> Iterator[Node]:
        while node is not None and node not in self._taken:
            yield node
            node = node.parent
