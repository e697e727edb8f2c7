"""Which computed pages are given up first when memory is short."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from treadle.scheduler.kv import Node


class RetentionPolicy(Protocol):
    """Orders the unlocked leaves of the prefix tree; the lowest priority is evicted first."""

    def priority(self, node: Node) -> tuple[float, ...]: ...


class LeastRecentlyUsed:
    """What was used longest ago goes first; of equals, what was created last."""

    def priority(self, node: Node) -> tuple[float, ...]:
        return (node.last_used, -node.order)


RETENTIONS: Mapping[str, type[RetentionPolicy]] = {"lru": LeastRecentlyUsed}
