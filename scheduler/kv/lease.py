"""A lease: somebody will want the KV that ends at a node, soon or later. A weight for eviction, never a lock."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from treadle.scheduler.kv.prefix import Node


@dataclass(slots=True, eq=False)
class Lease:
    """Protection of the pages from the root to `node`, as long as `owner` is expected to need them.

    Attributes:
        owner: The call that waits, is parked, or has ended and will be continued.
        program_id, tenant, arrival: Its program, and when that came (a rank, not a time).
        node: The deepest node that it covers; it moves up when that node is given up.
        since: When the owner came to rest.
        pause: What the program waits for, as a key of the pause model; None if the pages are wanted at once.
        num_tokens: Tokens that the owner will need there, whether or not they are still there.
        retained_until: Before that time the owner counts as coming back at once, because a hint says so.
        is_demoted: The owner counts as coming back last, because a hint says so.
    """

    owner: str
    program_id: str
    tenant: str
    arrival: int
    node: Node = field(repr=False)
    since: float
    pause: tuple[str, str] | None
    num_tokens: int
    retained_until: float = -math.inf
    is_demoted: bool = False

    @property
    def num_known_tokens(self) -> int:
        """Tokens from the root to the node: their KV is in one of the tiers."""
        node, count = self.node, 0
        while node.parent is not None:
            count += len(node.key)
            node = node.parent
        return count
