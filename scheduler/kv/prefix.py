"""A radix tree over token ids at page granularity: every full page that was ever computed and not yet given up.

    root(tenant)
      +-- [sys sys sys sys | tool tool tool tool]      one node: a run of full pages
            +-- [user A ...]                           lock_count: running calls at or below the node
            +-- [user B ...]                           leases: those that will come back to it
            |     +-- (half a page)                    a tail: the unfinished last page of a parked call
            +-- {user C ...}                           a hosted node: its pages are in host memory only

A running call locks the path to its deepest node; everything else may be given up, leaves and tails first. Handles are
nodes, not indices: a split keeps the lower half in the old object, so a handle goes on covering all that it covered.

There are two tiers. A node is *resident* if its pages are on the device; then so are those of all nodes above it. Some
of a resident node's first pages may have copies in host memory; a node that is not resident lives from its copies.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from treadle.scheduler.kv.lease import Lease


@dataclass(slots=True, eq=False)
class Node:
    """A run of pages that share one parent. `key` holds their tokens, `page_size` for each page.

    `pages` are on the device: all of the node's, or none. `copies` are slots of host memory that hold its first pages;
    all of them if the node is not resident. `usable_from` is the first step that may read the pages: a load into them
    is part of the step before. A node with an `owner` is a tail: one page, not full, that only its owner can claim.
    """

    key: array[int]
    pages: list[int]
    parent: Node | None
    last_used: float
    order: int
    owner: str | None = None
    copies: list[int] = field(default_factory=list)
    usable_from: int = 0
    lock_count: int = 0
    num_resident_below: int = 0
    children: dict[bytes, Node] = field(default_factory=dict)
    tails: dict[str, Node] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)

    @property
    def is_leaf(self) -> bool:
        return not self.children and not self.tails


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix.

    Attributes:
        node: Where the resident part ends.
        pages: They hold the KV of the first `num_tokens` tokens.
        hosted: The nodes that follow in host memory, which could be loaded.
        usable_from: First step that may read all of `pages`.
    """

    node: Node
    pages: list[int]
    num_tokens: int
    hosted: list[Node]
    usable_from: int

    @property
    def deepest(self) -> Node:
        """Where all that is known ends, in either tier."""
        return self.hosted[-1] if self.hosted else self.node


class PrefixTree:
    """Finds, keeps and gives up computed pages. It owns the pages and copies in its nodes; it never allocates any."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.num_pages = 0
        self.num_copies = 0
        self.num_evictable = 0
        self._roots: dict[str, Node] = {}
        self._resident_leaves: dict[Node, None] = {}
        self._hosted_leaves: dict[Node, None] = {}
        self._duplicated: dict[Node, None] = {}
        self._tails: dict[str, Node] = {}
        self._created = 0
        self._sweep_at = 16

    # Finding and holding

    def match(self, tenant: str, tokens: array[int], limit: int, now: float) -> Match:
        """Finds the longest run of full pages that `tokens[:limit]` begins with.

        The nodes found count as used `now`. Nothing is locked: lock before anything can be evicted.
        """
        node = self._root(tenant, now)
        position = 0
        whole = limit - limit % self.page_size
        while position < whole:
            child = node.children.get(self.page_key(tokens, position))
            if child is None:
                break
            count = self._common_pages(child.key, tokens, position, whole)
            if count * self.page_size < len(child.key):
                child = self.split(child, count)
            child.last_used = now
            position += count * self.page_size
            node = child
        self._join_upwards(node)
        hosted: list[Node] = []
        while node.parent is not None and not node.pages:
            hosted.append(node)
            node = node.parent
        hosted.reverse()
        end, path = node, []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        pages = [page for part in reversed(path) for page in part.pages]
        usable_from = max((part.usable_from for part in path), default=0)
        return Match(end, pages, len(pages) * self.page_size, hosted, usable_from)

    def _join_upwards(self, node: Node) -> None:
        """Undoes the cuts above a node that nobody needs any more."""
        while (upper := node.parent) is not None and upper.parent is not None:
            alike = bool(upper.pages) == bool(node.pages) and upper.lock_count == node.lock_count
            whole = len(upper.copies) * self.page_size == len(upper.key) or not node.copies
            if alike and whole and len(upper.children) == 1 and not upper.tails and not upper.leases:
                node.key = upper.key + node.key
                node.pages = upper.pages + node.pages
                node.copies = upper.copies + node.copies
                node.parent = upper.parent
                node.usable_from = max(upper.usable_from, node.usable_from)
                upper.parent.children[self.page_key(node.key, 0)] = node
                self._forget(upper)
                self._refresh(node)
            else:
                node = upper

    def lock(self, node: Node) -> None:
        """Protects a resident node and all above it from eviction."""
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

    def grant(self, lease: Lease) -> None:
        """Puts a lease on its node."""
        assert lease.owner not in lease.node.leases
        lease.node.leases[lease.owner] = lease

    def release(self, lease: Lease) -> None:
        """Takes a lease off its node."""
        del lease.node.leases[lease.owner]

    # Growing

    def extend(
        self, node: Node, tokens: array[int], pages: list[int], now: float
    ) -> tuple[Node, list[tuple[int, int]]]:
        """Adds full pages below a node that the caller has locked; the lock moves to the node where they end.

        The tree becomes the owner of `pages`, except where it already has resident pages with the same tokens.

        Returns:
            The deepest node, and for each duplicate its index in `pages` and the tree's page to use instead.
        """
        assert len(tokens) == len(pages) * self.page_size
        start, index = node, 0
        duplicates: list[tuple[int, int]] = []
        while index < len(pages):
            position = index * self.page_size
            child = node.children.get(self.page_key(tokens, position))
            if child is None:
                node = self._append(node, tokens[position:], pages[index:], now, sole_holder=node is start)
                break
            count = self._common_pages(child.key, tokens, position, len(tokens))
            if count * self.page_size < len(child.key):
                child = self.split(child, count)
            if child.pages:
                duplicates += [(index + i, page) for i, page in enumerate(child.pages)]
            else:
                self.make_resident(child, pages[index : index + count], 0)
            child.last_used = now
            index += count
            node = child
        self._move_lock(node, start)
        return node, duplicates

    def add_tail(self, node: Node, owner: str, tokens: array[int], page: int, now: float) -> None:
        """Keeps the unfinished last page of a call that holds no slot, until it takes it or memory is short."""
        assert 0 < len(tokens) < self.page_size and owner not in self._tails
        self._tails[owner] = node.tails[owner] = self._new_node(tokens, [page], node, now, owner)

    def take_tail(self, owner: str) -> Node | None:
        """Takes an owner's tail out of the tree, if it is still there: its page is the caller's."""
        tail = self._tails.get(owner)
        if tail is not None:
            self._remove(tail)
        return tail

    def make_resident(self, node: Node, pages: list[int], usable_from: int) -> None:
        """Gives a hosted node pages on the device. Its copies stay, as duplicates."""
        assert not node.pages and node.parent is not None and len(pages) * self.page_size == len(node.key)
        assert node.parent.parent is None or node.parent.pages
        node.pages = pages
        node.usable_from = usable_from
        node.parent.num_resident_below += 1
        self.num_pages += len(pages)
        self.num_evictable += len(pages)
        self._duplicated[node] = None
        self._refresh(node)
        self._refresh(node.parent)

    def split(self, node: Node, count: int) -> Node:
        """Cuts a node after `count` pages. The old object keeps the lower part; the new upper part is returned."""
        assert node.parent is not None and 0 < count * self.page_size < len(node.key)
        cut = count * self.page_size
        self._created += 1
        upper = Node(node.key[:cut], node.pages[:count], node.parent, node.last_used, self._created)
        upper.copies, node.copies = node.copies[:count], node.copies[count:]
        upper.lock_count, upper.usable_from = node.lock_count, node.usable_from
        upper.num_resident_below = bool(node.pages)
        upper.children[self.page_key(node.key, cut)] = node
        node.parent.children[self.page_key(node.key, 0)] = upper
        node.key, node.pages, node.parent = node.key[cut:], node.pages[count:], upper
        self._refresh(upper)
        self._refresh(node)
        return upper

    # Giving up

    def evictable_leaves(self) -> Iterator[Node]:
        """The resident nodes that may be demoted next, tails among them."""
        return (leaf for leaf in self._resident_leaves if leaf.lock_count == 0)

    def hosted_leaves(self) -> Iterator[Node]:
        """The nodes that are in host memory only, and have nothing below them."""
        return iter(self._hosted_leaves)

    def num_unsaved(self, leaf: Node, count: int) -> int:
        """How many of a leaf's last `count` pages have no copy."""
        return len(leaf.pages) - max(len(leaf.copies), len(leaf.pages) - count)

    def demote(self, leaf: Node, count: int, slots: list[int]) -> tuple[list[int], list[int]]:
        """Gives up the last `count` pages of an evictable leaf.

        What has a copy stays in host memory; `slots` are for copies of the first of those that have none. The rest is
        forgotten, and with it what is below it in host memory.

        Returns:
            The pages, the last one first, and the slots of what was forgotten.
        """
        keep = len(leaf.pages) - count
        freed = leaf.pages[keep:][::-1]
        saved = max(len(leaf.copies), keep) + len(slots)
        forgotten: list[int] = []
        if saved < len(leaf.pages):
            for child in list(leaf.children.values()):
                forgotten += self._remove(child)
        if saved == 0:
            self._remove(leaf)
            return freed, forgotten
        self.num_copies += len(slots)
        self.num_pages -= count
        self.num_evictable -= count
        if saved > keep > 0:
            if saved == len(leaf.pages) and len(leaf.children) == 1 and not leaf.leases:
                self._pass_down(leaf, keep, slots)
                return freed, forgotten
            self.split(leaf, keep)
            saved -= keep
            keep = 0
        leaf.copies += slots
        if keep == 0:
            assert leaf.parent is not None
            leaf.pages = []
            leaf.parent.num_resident_below -= 1
            self._refresh(leaf.parent)
            del leaf.key[saved * self.page_size :]
        else:
            del leaf.pages[keep:]
            del leaf.key[keep * self.page_size :]
        self._refresh(leaf)
        return freed, forgotten

    def _pass_down(self, leaf: Node, keep: int, slots: list[int]) -> None:
        """Gives all pages of a leaf but the first ones to the only node below it, which is in host memory too."""
        cut = keep * self.page_size
        (child,) = leaf.children.values()
        child.key = leaf.key[cut:] + child.key
        child.copies = leaf.copies[keep:] + slots + child.copies
        leaf.children = {self.page_key(child.key, 0): child}
        del leaf.copies[keep:], leaf.key[cut:], leaf.pages[keep:]
        self._refresh(leaf)

    def drop_duplicates(self, count: int, spared: set[Node]) -> list[int]:
        """Gives up to `count` slots of host memory whose pages are on the device as well."""
        freed: list[int] = []
        for node in list(self._duplicated):
            if len(freed) >= count:
                break
            if node not in spared:
                freed += self._drop_copies(node, count - len(freed))
        return freed

    def drop_hosted(self, leaf: Node, count: int) -> list[int]:
        """Gives up the last pages, at most `count`, of a leaf that is in host memory only."""
        if count >= len(leaf.copies):
            return self._remove(leaf)
        freed = self._drop_copies(leaf, count)
        del leaf.key[len(leaf.copies) * self.page_size :]
        return freed

    def _drop_copies(self, node: Node, count: int) -> list[int]:
        freed = node.copies[-count:]
        del node.copies[-count:]
        self.num_copies -= len(freed)
        self._refresh(node)
        return freed

    def _remove(self, node: Node) -> list[int]:
        """Takes out a node with nothing resident below it. Returns the slots that it and those below it had."""
        parent = node.parent
        assert parent is not None and node.lock_count == 0 and not node.num_resident_below
        if node.owner is not None:
            del parent.tails[node.owner], self._tails[node.owner]
        else:
            del parent.children[self.page_key(node.key, 0)]
        if node.pages:
            parent.num_resident_below -= 1
        self.num_pages -= len(node.pages)
        self.num_evictable -= len(node.pages)
        slots: list[int] = []
        below = [node]
        while below:
            step = below.pop()
            below += step.children.values()
            slots += step.copies
            for lease in step.leases.values():
                lease.node = parent
                parent.leases[lease.owner] = lease
            self._forget(step)
        self.num_copies -= len(slots)
        self._refresh(parent)
        return slots

    def _forget(self, node: Node) -> None:
        for nodes in (self._resident_leaves, self._hosted_leaves, self._duplicated):
            nodes.pop(node, None)

    # Links

    def _root(self, tenant: str, now: float) -> Node:
        root = self._roots.get(tenant)
        if root is None:
            if len(self._roots) >= self._sweep_at:
                self._sweep_roots()
            root = self._roots[tenant] = Node(array("i"), [], None, now, 0)
        return root

    def _sweep_roots(self) -> None:
        """Drops the roots that hold nothing, so that a stream of tenant names does not grow the tree for ever."""
        self._roots = {
            tenant: root for tenant, root in self._roots.items() if not root.is_leaf or root.lock_count or root.leases
        }
        self._sweep_at = 2 * len(self._roots) + 16

    def page_key(self, tokens: array[int], position: int) -> bytes:
        """What distinguishes the children of a node: the tokens of their first page."""
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
        parent.num_resident_below += 1
        self.num_pages += len(pages)
        self.num_evictable += len(pages)
        self._refresh(node)
        self._refresh(parent)
        return node

    def _append(self, node: Node, tokens: array[int], pages: list[int], now: float, *, sole_holder: bool) -> Node:
        """Puts new pages below `node`: in `node` itself if the caller alone holds it and nothing hangs from it."""
        alone = sole_holder and node.lock_count == 1 and node.is_leaf and not node.leases
        if alone and node.parent is not None:
            node.key.extend(tokens)
            node.pages.extend(pages)
            node.last_used = now
            self.num_pages += len(pages)
            return node
        child = self._new_node(tokens, pages, node, now)
        node.children[self.page_key(tokens, 0)] = child
        return child

    def _move_lock(self, node: Node, held: Node | None) -> None:
        """Locks `node` and what is above it, up to `held`, from where on the caller has locked the path already."""
        step: Node | None = node
        while step is not held:
            assert step is not None
            if step.lock_count == 0:
                self.num_evictable -= len(step.pages)
            step.lock_count += 1
            step = step.parent

    def _refresh(self, node: Node) -> None:
        """Puts a node into the sets that it belongs to, and takes it out of the others."""
        if node.parent is None:
            return
        for nodes, belongs in (
            (self._resident_leaves, bool(node.pages) and not node.num_resident_below),
            (self._hosted_leaves, not node.pages and not node.children),
            (self._duplicated, bool(node.pages) and bool(node.copies)),
        ):
            if belongs:
                nodes[node] = None
            else:
                nodes.pop(node, None)

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
        """Asserts that counts, links, keys, tiers, locks and leases agree."""
        nodes = list(self.nodes())
        pages = [page for node in nodes for page in node.pages]
        copies = [slot for node in nodes for slot in node.copies]
        assert len(pages) == len(set(pages)) == self.num_pages
        assert len(copies) == len(set(copies)) == self.num_copies
        assert sum(len(node.pages) for node in nodes if node.lock_count == 0) == self.num_evictable
        assert set(self._resident_leaves) == {node for node in nodes if node.pages and not node.num_resident_below}
        assert set(self._hosted_leaves) == {node for node in nodes if not node.pages and node.is_leaf}
        assert set(self._duplicated) == {node for node in nodes if node.pages and node.copies}
        assert set(self._tails.values()) == {node for node in nodes if node.owner is not None}
        for node in [*nodes, *self._roots.values()]:
            below = [*node.children.values(), *node.tails.values()]
            assert node.num_resident_below == sum(bool(child.pages) for child in below)
            assert all(lease.node is node and lease.owner == owner for owner, lease in node.leases.items())
        for node in nodes:
            parent = node.parent
            assert parent is not None and (node.pages or node.copies)
            assert parent.lock_count >= node.lock_count
            assert not node.pages or parent.pages or parent.parent is None, "a resident node under one that is not"
            if node.owner is not None:
                assert parent.tails[node.owner] is node and node.is_leaf and node.lock_count == 0
                assert len(node.pages) == 1 and 0 < len(node.key) < self.page_size and not node.copies
            else:
                assert parent.children[self.page_key(node.key, 0)] is node
                assert len(node.key) == max(len(node.pages), len(node.copies)) * self.page_size
                assert not node.pages or len(node.pages) * self.page_size == len(node.key)
