"""A radix tree over token ids at page granularity: every full page that was ever computed and not yet evicted.

    root(tenant)
      +-- [sys sys sys sys | tool tool tool tool]      one node: a run of full pages
            +-- [user A ...]                           lock_count: running calls at or below the node
            +-- [user B ...]
                  +-- (half a page)                    a tail: the unfinished last page of a parked call

A running call locks the path to its deepest node; everything else may be evicted, leaves and tails first. Handles are
nodes, not indices: a split keeps the lower half in the old object, so a handle goes on covering all that it covered.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, eq=False)
class Node:
    """A run of pages that share one parent. `key` holds their tokens, `page_size` for each page.

    A node with an `owner` is a tail: one page, not full, that only its owner can claim.
    """

    key: array[int]
    pages: list[int]
    parent: Node | None
    last_used: float
    order: int
    owner: str | None = None
    lock_count: int = 0
    children: dict[bytes, Node] = field(default_factory=dict)
    tails: dict[str, Node] = field(default_factory=dict)

    @property
    def is_leaf(self) -> bool:
        return not self.children and not self.tails


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix: `pages` hold the KV of the first `num_tokens` tokens; `node` is where it ends."""

    node: Node
    pages: list[int]
    num_tokens: int


class PrefixTree:
    """Finds, keeps and gives up computed pages. It owns the pages in its nodes; it never allocates any."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.num_pages = 0
        self.num_evictable = 0
        self._roots: dict[str, Node] = {}
        self._leaves: dict[Node, None] = {}
        self._tails: dict[str, Node] = {}
        self._created = 0
        self._sweep_at = 16

    def match(self, tenant: str, tokens: array[int], limit: int, now: float) -> Match:
        """Finds the longest run of full pages that `tokens[:limit]` begins with.

        The nodes found count as used `now`. Nothing is locked: lock before anything can be evicted.
        """
        node = self._root(tenant, now)
        pages: list[int] = []
        position = 0
        whole = limit - limit % self.page_size
        while position < whole:
            child = node.children.get(self._page_key(tokens, position))
            if child is None:
                break
            count = self._common_pages(child.key, tokens, position, whole)
            if count < len(child.pages):
                child = self._split(child, count)
            child.last_used = now
            pages += child.pages
            position += count * self.page_size
            node = child
        return Match(node, pages, position)

    def lock(self, node: Node) -> None:
        """Protects a node and all above it from eviction."""
        self._move_lock(node, None)

    def unlock(self, node: Node, now: float) -> None:
        """Undoes one `lock`."""
        step: Node | None = node
        while step is not None:
            assert step.lock_count > 0
            step.lock_count -= 1
            step.last_used = now
            if step.lock_count == 0:
                self.num_evictable += len(step.pages)
            step = step.parent

    def extend(
        self, node: Node, tokens: array[int], pages: list[int], now: float
    ) -> tuple[Node, list[tuple[int, int]]]:
        """Adds full pages below a node that the caller has locked; the lock moves to the node where they end.

        The tree becomes the owner of `pages`, except where it already has pages with the same tokens.

        Returns:
            The deepest node, and for each duplicate its index in `pages` and the tree's page to use instead.
        """
        assert len(tokens) == len(pages) * self.page_size
        start, index = node, 0
        duplicates: list[tuple[int, int]] = []
        while index < len(pages):
            position = index * self.page_size
            child = node.children.get(self._page_key(tokens, position))
            if child is None:
                node = self._append(node, tokens[position:], pages[index:], now, sole_holder=node is start)
                break
            count = self._common_pages(child.key, tokens, position, len(tokens))
            if count < len(child.pages):
                child = self._split(child, count)
            duplicates += [(index + i, page) for i, page in enumerate(child.pages)]
            child.last_used = now
            index += count
            node = child
        self._move_lock(node, start)
        return node, duplicates

    def add_tail(self, node: Node, owner: str, tokens: array[int], page: int, now: float) -> None:
        """Keeps the unfinished last page of a call that holds no slot, until it takes it or memory is short."""
        assert 0 < len(tokens) < self.page_size and owner not in self._tails
        self._tails[owner] = node.tails[owner] = self._new_node(tokens, [page], node, now, owner)
        self._leaves.pop(node, None)

    def take_tail(self, owner: str) -> Node | None:
        """Takes an owner's tail out of the tree, if it is still there: its page is the caller's."""
        tail = self._tails.get(owner)
        if tail is not None:
            self._remove(tail)
        return tail

    def evict(self, count: int, priority: Callable[[Node], Any]) -> list[int]:
        """Gives up to `count` pages, last page first, from unlocked leaves in ascending order of `priority`."""
        freed: list[int] = []
        while len(freed) < count:
            victims = sorted((leaf for leaf in self._leaves if leaf.lock_count == 0), key=priority)
            if not victims:
                break
            for leaf in victims:
                if len(freed) >= count:
                    break
                freed += self._trim(leaf, count - len(freed))
        return freed

    def _trim(self, leaf: Node, count: int) -> list[int]:
        taken = leaf.pages[-count:][::-1]
        if len(taken) == len(leaf.pages):
            self._remove(leaf)
            return taken
        del leaf.pages[-count:]
        del leaf.key[len(leaf.pages) * self.page_size :]
        self.num_pages -= count
        self.num_evictable -= count
        return taken

    def _root(self, tenant: str, now: float) -> Node:
        root = self._roots.get(tenant)
        if root is None:
            if len(self._roots) >= self._sweep_at:
                self._sweep_roots()
            root = self._roots[tenant] = Node(array("i"), [], None, now, 0)
        return root

    def _sweep_roots(self) -> None:
        """Drops the roots that hold nothing, so that a stream of tenant names does not grow the tree for ever."""
        self._roots = {t: root for t, root in self._roots.items() if not root.is_leaf or root.lock_count}
        self._sweep_at = 2 * len(self._roots) + 16

    def _page_key(self, tokens: array[int], position: int) -> bytes:
        return tokens[position : position + self.page_size].tobytes()

    def _common_pages(self, key: array[int], tokens: array[int], position: int, end: int) -> int:
        length = min(len(key), end - position)
        if key[:length] == tokens[position : position + length]:
            return length // self.page_size
        low, high = 1, length // self.page_size
        while low < high:
            middle = (low + high + 1) // 2
            size = middle * self.page_size
            if key[:size] == tokens[position : position + size]:
                low = middle
            else:
                high = middle - 1
        return low

    def _new_node(self, key: array[int], pages: list[int], parent: Node, now: float, owner: str | None = None) -> Node:
        self._created += 1
        node = Node(key, pages, parent, now, self._created, owner)
        self._leaves[node] = None
        self.num_pages += len(pages)
        self.num_evictable += len(pages)
        return node

    def _append(self, node: Node, tokens: array[int], pages: list[int], now: float, *, sole_holder: bool) -> Node:
        """Puts new pages below `node`: in `node` itself if the caller alone holds it and nothing hangs from it."""
        if sole_holder and node.lock_count == 1 and node.is_leaf and node.parent is not None:
            node.key.extend(tokens)
            node.pages.extend(pages)
            node.last_used = now
            self.num_pages += len(pages)
            return node
        child = self._new_node(tokens, pages, node, now)
        node.children[self._page_key(tokens, 0)] = child
        self._leaves.pop(node, None)
        return child

    def _split(self, node: Node, count: int) -> Node:
        """Cuts a node after `count` pages. The old object keeps the lower part; the new upper part is returned."""
        assert 0 < count < len(node.pages) and node.parent is not None
        cut = count * self.page_size
        self._created += 1
        upper = Node(node.key[:cut], node.pages[:count], node.parent, node.last_used, self._created)
        upper.lock_count = node.lock_count
        upper.children[self._page_key(node.key, cut)] = node
        node.parent.children[self._page_key(node.key, 0)] = upper
        node.key, node.pages, node.parent = node.key[cut:], node.pages[count:], upper
        return upper

    def _move_lock(self, node: Node, held: Node | None) -> None:
        """Locks `node` and what is above it, up to `held`, from where on the caller has locked the path already."""
        step: Node | None = node
        while step is not held:
            assert step is not None
            if step.lock_count == 0:
                self.num_evictable -= len(step.pages)
            step.lock_count += 1
            step = step.parent

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None and node.is_leaf and node.lock_count == 0
        if node.owner is not None:
            del parent.tails[node.owner], self._tails[node.owner]
        else:
            del parent.children[self._page_key(node.key, 0)]
        del self._leaves[node]
        if parent.is_leaf and parent.parent is not None:
            self._leaves[parent] = None
        self.num_pages -= len(node.pages)
        self.num_evictable -= len(node.pages)

    def roots(self) -> Iterator[Node]:
        """The root of each tenant: its lock count is the number of calls that hold a path below it."""
        yield from self._roots.values()

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents before children."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack += [*node.children.values(), *node.tails.values()]

    def check_integrity(self) -> None:
        """Asserts that counts, links, keys and locks agree."""
        nodes = list(self.nodes())
        pages = [page for node in nodes for page in node.pages]
        assert len(pages) == len(set(pages)) == self.num_pages
        assert sum(len(node.pages) for node in nodes if node.lock_count == 0) == self.num_evictable
        assert set(self._leaves) == {node for node in nodes if node.is_leaf}
        assert set(self._tails.values()) == {node for node in nodes if node.owner is not None}
        for node in nodes:
            assert node.parent is not None and node.pages
            assert node.parent.lock_count >= node.lock_count
            if node.owner is not None:
                assert node.parent.tails[node.owner] is node and node.is_leaf and node.lock_count == 0
                assert len(node.pages) == 1 and 0 < len(node.key) < self.page_size
            else:
                assert node.parent.children[self._page_key(node.key, 0)] is node
                assert len(node.key) == len(node.pages) * self.page_size
