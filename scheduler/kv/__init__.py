"""Bookkeeping of KV pages: the pool, the prefix tree, and the leases on it."""

from treadle.scheduler.kv.lease import Lease
from treadle.scheduler.kv.pages import PagePool
from treadle.scheduler.kv.prefix import Match, Node, PrefixTree

__all__ = ["Lease", "Match", "Node", "PagePool", "PrefixTree"]
