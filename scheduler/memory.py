"""The memory of calls: which pages a call holds, what it shares through the prefix tree, and what it gives back."""

from __future__ import annotations

from collections import deque

from treadle.scheduler.call import Call
from treadle.scheduler.kv import Match, Node, PagePool, PrefixTree
from treadle.scheduler.policies.retention import RetentionPolicy

GROWTH_PAGES = 4


class CallMemory:
    """Page pools and prefix tree, seen from a call: attach, grow, load, publish, detach.

    Pages that are evicted from the device go to host memory while it has room and moves are left in the step; what is
    found there is loaded back. A step saves first, then computes, and loads meanwhile::

        step n     | save evicted pages | compute rows ...............|
                                        | load pages for step n+1 ... |

    A page that a launched step may still write is not handed out again before that step is done: while steps are in
    flight, freed pages wait in `_deferred` for the last of them. What a step loads is locked until it is done.
    """

    def __init__(
        self, num_pages: int, num_host_pages: int, page_size: int, max_step_moves: int, retention: RetentionPolicy
    ) -> None:
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.host = PagePool(num_host_pages)
        self.tree = PrefixTree(page_size)
        self.num_evicted = 0
        self.num_saved = 0
        self.num_loaded = 0
        self._retention = retention
        self._max_step_moves = max_step_moves
        self._saves: dict[int, int] = {}
        self._loads: list[tuple[int, int]] = []
        self._loading: deque[tuple[int, Node]] = deque()
        self._wanted: set[Node] = set()
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

    @property
    def is_loading(self) -> bool:
        """Whether a step loads pages that is not done yet."""
        return bool(self._loading)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-num_tokens // self.page_size)

    def num_missing_pages(self, call: Call) -> int:
        """Pages that a call with a slot still needs for the tokens that it has."""
        return 0 if call.node is None else max(0, self.pages_for(call.num_tokens) - len(call.pages))

    def has_work(self, call: Call) -> bool:
        """Whether a call has enough to compute. Of a prompt that still grows that is some pages: fewer are cheaper
        together with what comes next."""
        if not call.open:
            return True
        num_known = max(call.num_planned_tokens, call.num_accounted_tokens)
        return call.num_tokens - num_known >= GROWTH_PAGES * self.page_size

    def has_next_page(self, call: Call) -> bool:
        """Whether the page after a call's published ones is a full one of tokens that are known already."""
        return len(call.tokens) >= (call.num_tree_pages + 1) * self.page_size

    def next_page_key(self, call: Call) -> bytes:
        """What that page will be known by in the tree."""
        return self.tree.page_key(call.tokens, call.num_tree_pages * self.page_size)

    def step_launched(self, step_id: int) -> None:
        self._last_launched = step_id

    def step_completed(self, step_id: int, now: float) -> bool:
        """Returns whether pages came back with it that can be used from now on."""
        self._last_completed = step_id
        changed = False
        while self._deferred and self._deferred[0][0] <= step_id:
            _, pages = self._deferred.popleft()
            self._num_deferred -= len(pages)
            self.pool.free(pages)
            changed = True
        while self._loading and self._loading[0][0] <= step_id:
            self.tree.unlock(self._loading.popleft()[1], now)
            changed = True
        return changed

    def take_moves(self) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """The moves of the step that is being planned: pairs of page and slot to save, of slot and page to load."""
        saves = tuple((page, slot) for slot, page in self._saves.items())
        loads = tuple(self._loads)
        self.num_saved += len(saves)
        self.num_loaded += len(loads)
        self._saves.clear()
        self._loads.clear()
        return saves, loads

    def find(self, call: Call, now: float) -> Match:
        """What the tree has of a call's tokens. The last token is never matched: its logits are wanted."""
        # A closed prompt must compute its last token to sample from it; an open one need not.
        limit = len(call.tokens) if call.open else len(call.tokens) - 1
        return self.tree.match(call.namespace, call.tokens, limit, now)

    def attach(self, call: Call, match: Match) -> None:
        """Locks what was found for a call; a call without pages becomes one with some."""
        assert not call.pages and call.num_pending == 0
        tokens, num_known = call.tokens, match.num_tokens
        limit = len(tokens) if call.open else len(tokens) - 1
        self.tree.lock(match.node)
        call.node, call.pages = match.node, match.pages
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

    def load(self, hosted: list[Node], step_id: int, now: float) -> int:
        """Loads pages that follow those of an attached call, as many as the step can still move and find room.

        Returns:
            How many. They can be attached from the next step on.
        """
        moved = 0
        self._wanted = set(hosted)
        for node in hosted:
            count = min(len(node.copies), self._num_loadable(), self.num_available)
            if count <= 0:
                break
            is_part = count < len(node.copies)
            if is_part:
                node = self.tree.split(node, count)
            self._make_room(count, now)
            pages = self.pool.allocate(count)
            self.tree.make_resident(node, pages, step_id + 1)
            self.tree.lock(node)
            self._loading.append((step_id, node))
            self._loads += zip(node.copies, pages, strict=True)
            moved += count
            if is_part:
                break
        self._wanted = set()
        return moved

    def _num_loadable(self) -> int:
        """Pages that the step can still load without evicting more than it can save.

        A page that is evicted unsaved takes with it what is below it in host memory. So a quarter of the saves is left
        to calls that grow.
        """
        saves_left = self._max_step_moves - self._max_step_moves // 4 - len(self._saves)
        return min(self._max_step_moves - len(self._loads), self.pool.num_free + max(0, saves_left))

    def grow(self, call: Call, num_tokens: int, now: float, *, evict: bool = True) -> bool:
        """Gives a call pages for its first `num_tokens` tokens, evicting if need be; False if there are too few."""
        missing = self.pages_for(num_tokens) - len(call.pages)
        if missing <= 0:
            return True
        if missing > (self.num_available if evict else self.pool.num_free):
            return False
        self._make_room(missing, now)
        call.pages += self.pool.allocate(missing)
        return True

    def _make_room(self, count: int, now: float) -> None:
        """Evicts until `count` pages are free. There are as many."""
        priority = self._retention.priority
        while self.pool.num_free < count:
            leaf = min(self.tree.evictable_leaves(), key=lambda node: (priority(node, now), -node.order))
            taken = min(count - self.pool.num_free, len(leaf.pages))
            pages, slots = self.tree.demote(leaf, taken, self._reserve_slots(leaf, taken, now))
            self.num_evicted += taken
            self.pool.free(pages)
            self.host.free(slots)

    def _reserve_slots(self, leaf: Node, count: int, now: float) -> list[int]:
        """Slots for the first of a leaf's last `count` pages without copies, at the cost of less valuable copies."""
        if not self.host.num_pages or leaf.owner is not None:
            return []
        wanted = min(self.tree.num_unsaved(leaf, count), self._max_step_moves - len(self._saves))
        if wanted > self.host.num_free:
            spared = {leaf, *(node for _, node in self._loading)}
            self.host.free(self.tree.drop_duplicates(wanted - self.host.num_free, spared))
        value = self._retention.priority(leaf, now)
        while wanted > self.host.num_free:
            worst = min(
                (node for node in self.tree.hosted_leaves() if node not in self._wanted),
                key=lambda node: (self._retention.priority(node, now), -node.order),
                default=None,
            )
            if worst is None or self._retention.priority(worst, now) > value:
                break
            self.host.free(self.tree.drop_hosted(worst, wanted - self.host.num_free))
        slots = self.host.allocate(min(wanted, self.host.num_free))
        first = max(len(leaf.copies), len(leaf.pages) - count)
        for page, slot in zip(leaf.pages[first:], slots, strict=False):
            self._saves[slot] = page
        return slots

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

    def detach(self, call: Call, now: float, *, keep_tail: bool = False) -> Node:
        """Takes a call's pages away. The full ones stay in the tree, evictable, and so does a tail if it is kept.

        Returns:
            The node where the full ones end.
        """
        node = call.node
        assert node is not None
        private = call.pages[call.num_tree_pages :]
        unfinished = call.num_computed_tokens - call.num_tree_pages * self.page_size
        if keep_tail and unfinished > 0:
            tail = call.tokens[call.num_computed_tokens - unfinished : call.num_computed_tokens]
            self.tree.add_tail(node, call.id, tail, private[0], now)
            private = private[1:]
        self.tree.unlock(node, now)
        self._free(private[::-1])
        call.node = None
        call.pages = []
        call.num_tree_pages = call.num_computed_tokens = call.num_planned_tokens = 0
        return node

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
        self.host.check_integrity()
        self.tree.check_integrity()
        assert not self._saves and not self._loads, "moves that no step carries out"
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
        assert self.tree.num_copies == self.host.num_pages - self.host.num_free
        locks = sum(node.lock_count for node in self.tree.roots())
        assert locks == sum(call.node is not None for call in calls) + len(self._loading) + self._retention.num_pins
