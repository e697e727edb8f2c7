"""The memory of calls: which pages a call holds, what it shares through the prefix tree, and what it gives back."""

from __future__ import annotations

from collections import deque

from treadle.scheduler.call import Call
from treadle.scheduler.kv import PagePool, PrefixTree
from treadle.scheduler.policies import RetentionPolicy


class CallMemory:
    """Page pool and prefix tree, seen from a call: attach, grow, publish, detach.

    A page that a launched step may still write is not handed out again before that step is done: while steps are in
    flight, freed pages wait in `_deferred` for the last of them.
    """

    def __init__(self, num_pages: int, page_size: int, retention: RetentionPolicy) -> None:
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.tree = PrefixTree(page_size)
        self.num_evicted = 0
        self._retention = retention
        self._last_launched = 0
        self._last_completed = 0
        self._deferred: deque[tuple[int, list[int]]] = deque()
        self._num_deferred = 0

    @property
    def num_available(self) -> int:
        """Pages that are free or can be evicted."""
        return self.pool.num_free + self.tree.num_evictable

    @property
    def num_deferred(self) -> int:
        """Pages that become free when the steps in flight are done."""
        return self._num_deferred

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-num_tokens // self.page_size)

    def num_missing_pages(self, call: Call) -> int:
        """Pages that a call with a slot still needs for the tokens that it has."""
        return 0 if call.node is None else self.pages_for(call.num_tokens) - len(call.pages)

    def step_launched(self, step_id: int) -> None:
        self._last_launched = step_id

    def step_completed(self, step_id: int) -> None:
        self._last_completed = step_id
        while self._deferred and self._deferred[0][0] <= step_id:
            _, pages = self._deferred.popleft()
            self._num_deferred -= len(pages)
            self.pool.free(pages)

    def attach(self, call: Call, now: float) -> None:
        """Finds what the tree has of a call's tokens and locks it; a call without pages becomes one with some.

        The last token is never matched: its logits are wanted.
        """
        assert not call.pages and call.num_pending == 0
        tokens = call.tokens
        # A closed prompt must compute its last token to sample from it; an open one need not.
        limit = len(tokens) if call.open else len(tokens) - 1
        match = self.tree.match(call.namespace, tokens, limit, now)
        self.tree.lock(match.node)
        call.node, call.pages, num_known = match.node, match.pages, match.num_tokens
        call.num_tree_pages = len(match.pages)
        tail = self.tree.take_tail(call.id)
        if tail is None and call.extends is not None:
            tail = self.tree.take_tail(call.extends)
        if tail is not None:
            continues = tail.key == tokens[num_known : num_known + len(tail.key)]
            if tail.parent is match.node and num_known < limit and continues:
                call.pages += tail.pages
                num_known = min(num_known + len(tail.key), limit)
            else:
                self._free(tail.pages)
        call.num_computed_tokens = call.num_planned_tokens = num_known

    def grow(self, call: Call, num_tokens: int, *, evict: bool = True) -> bool:
        """Gives a call pages for its first `num_tokens` tokens, evicting if need be; False if there are too few."""
        missing = self.pages_for(num_tokens) - len(call.pages)
        if missing <= 0:
            return True
        shortage = missing - self.pool.num_free
        if shortage > 0:
            if not evict or shortage > self.tree.num_evictable:
                return False
            evicted = self.tree.evict(shortage, self._retention.priority)
            self.num_evicted += len(evicted)
            self.pool.free(evicted)
        call.pages += self.pool.allocate(missing)
        return True

    def publish(self, call: Call, now: float) -> list[tuple[int, int]]:
        """Puts the pages that a call has filled into the tree.

        Returns:
            Index and page of each page for which the tree had one with the same tokens; the call uses that from now on.
        """
        full, known = call.num_computed_tokens // self.page_size, call.num_tree_pages
        if full <= known:
            return []
        assert call.node is not None
        tokens = call.tokens[known * self.page_size : full * self.page_size]
        call.node, duplicates = self.tree.extend(call.node, tokens, call.pages[known:full], now)
        call.num_tree_pages = full
        swapped = [(known + index, page) for index, page in duplicates]
        self._free([call.pages[index] for index, _ in swapped])
        for index, page in swapped:
            call.pages[index] = page
        return swapped

    def detach(self, call: Call, now: float, *, keep_tail: bool = False) -> None:
        """Takes a call's pages away. The full ones stay in the tree, evictable, and so does a tail if it is kept."""
        assert call.node is not None
        private = call.pages[call.num_tree_pages :]
        unfinished = call.num_computed_tokens - call.num_tree_pages * self.page_size
        if keep_tail and unfinished > 0:
            tail = call.tokens[call.num_computed_tokens - unfinished : call.num_computed_tokens]
            self.tree.add_tail(call.node, call.id, tail, private[0], now)
            private = private[1:]
        self.tree.unlock(call.node, now)
        self._free(private[::-1])
        call.node = None
        call.pages = []
        call.num_tree_pages = call.num_computed_tokens = call.num_planned_tokens = 0

    def forget_tail(self, call_id: str) -> None:
        """Frees the unfinished page that a call left in the tree, if it is still there."""
        tail = self.tree.take_tail(call_id)
        if tail is not None:
            self._free(tail.pages)

    def _free(self, pages: list[int]) -> None:
        if not pages:
            return
        if self._last_launched > self._last_completed:
            self._deferred.append((self._last_launched, pages))
            self._num_deferred += len(pages)
        else:
            self.pool.free(pages)

    def check_integrity(self, calls: list[Call]) -> None:
        """Asserts that every page is in one place: free, deferred, in the tree, or private to one of the calls."""
        self.pool.check_integrity()
        self.tree.check_integrity()
        deferred = [page for _, pages in self._deferred for page in pages]
        assert len(deferred) == self._num_deferred
        held = [page for node in self.tree.nodes() for page in node.pages] + deferred
        for call in calls:
            held += call.pages[call.num_tree_pages :]
            path: list[int] = []
            node = call.node
            while node is not None:
                path = node.pages + path
                node = node.parent
            assert path == call.pages[: call.num_tree_pages], f"{call.id}: its pages are not its path"
        assert len(held) == len(set(held)) == self.pool.num_pages - self.pool.num_free
        locks = sum(node.lock_count for node in self.tree.roots())
        assert locks == sum(call.node is not None for call in calls)
