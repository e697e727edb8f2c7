"""Bookkeeping of KV pages: the pool and the prefix tree."""

from treadle.scheduler.kv.pages import PagePool
from treadle.scheduler.kv.prefix import Match, Node, PrefixTree

__all__ = ["Match", "Node", "PagePool", "PrefixTree"]
