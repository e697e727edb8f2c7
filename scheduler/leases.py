"""The leases of programs: granted when a call comes to rest, claimed when it or its continuation goes on."""

from __future__ import annotations

from treadle.scheduler.call import Call, Program
from treadle.scheduler.kv import Lease, Node, PrefixTree

MAX_LEASES = 256


class Leases:
    """Who will come back to which node.

    A program that has `MAX_LEASES` loses the oldest of those at rest for a new one. Those of waiting calls never fall:
    there are no more than calls.
    """

    def __init__(self, tree: PrefixTree, every: dict[str, Lease]) -> None:
        self._tree = tree
        self._every = every

    def wait(self, call: Call, node: Node, now: float) -> None:
        """A call waits for a slot: its pages are wanted at once."""
        self._grant(call, node, now, None)

    def park(self, call: Call, node: Node, now: float) -> Lease:
        """A call is parked, or has ended and will be continued: its pages are wanted after a pause."""
        return self._grant(call, node, now, (call.program.kind, call.program.tool))

    def end(self, call: Call) -> None:
        """The call's own lease, if it has one, is over: it runs, or nobody will continue it."""
        lease = call.program.leases.get(call.id)
        if lease is not None:
            self._release(call.program, lease)

    def claim(self, call: Call, node: Node) -> Lease | None:
        """Ends the lease that a call continues: its own, or that of the call that it extends.

        A call that no graph was declared for does not say what it extends: then it is the last one on the same path.
        """
        leases = call.program.leases
        lease = leases.get(call.id) or leases.get(call.extends or "")
        if lease is None and call.node_id is None:
            near = [lease for lease in leases.values() if lease.pause is not None and _related(lease.node, node)]
            lease = max(near, key=lambda lease: lease.since, default=None)
        if lease is not None:
            self._release(call.program, lease)
        return lease

    def move(self, call: Call, node: Node) -> None:
        """More of what a waiting call wants is known than when it began to wait."""
        lease = call.program.leases[call.id]
        self._tree.release(lease)
        lease.node = node
        self._tree.grant(lease)

    def tell(self, program: Program, tool: str) -> None:
        """What a program waits for is known now, by name."""
        program.tool = tool
        for lease in program.leases.values():
            if lease.pause is not None:
                lease.pause = (program.kind, tool)

    def drop_resting(self, program: Program) -> None:
        """Nobody will continue the calls that have come to rest."""
        for lease in [lease for lease in program.leases.values() if lease.pause is not None]:
            self._release(program, lease)

    def drop(self, program: Program) -> None:
        """The program has ended: nobody will come back."""
        for lease in list(program.leases.values()):
            self._release(program, lease)

    def _release(self, program: Program, lease: Lease) -> None:
        del program.leases[lease.owner], self._every[lease.owner]
        self._tree.release(lease)

    def _grant(self, call: Call, node: Node, now: float, pause: tuple[str, str] | None) -> Lease:
        program = call.program
        self.end(call)
        if pause is not None and len(program.leases) >= MAX_LEASES:
            resting = next((lease for lease in program.leases.values() if lease.pause is not None), None)
            if resting is not None:
                self._release(program, resting)
        lease = Lease(call.id, program.id, program.tenant, program.arrival, node, now, pause, call.num_tokens)
        program.leases[call.id] = self._every[call.id] = lease
        self._tree.grant(lease)
        return lease


def _related(one: Node, other: Node) -> bool:
    """Whether one node lies on the other's path, below the root."""
    return _on_path(one, other) or _on_path(other, one)


def _on_path(upper: Node, lower: Node) -> bool:
    step: Node | None = lower
    while step is not None and step.parent is not None:
        if step is upper:
            return True
        step = step.parent
    return False
