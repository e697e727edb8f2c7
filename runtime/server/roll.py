"""The roll of programs: who is live, by every name there is for them, and who ended not long ago."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence

from treadle.runtime.server.conversations import Digest, Message, digests
from treadle.runtime.server.errors import ApiError
from treadle.runtime.server.program import End, LiveProgram, ProgramNode
from treadle.runtime.server.tenants import Tenant

MAX_NODES = 4096
MAX_TENANT_NODES = 65_536
MAX_ENDS = 256
MAX_ENDED = 512
MAX_ENDED_NODES = 65_536
FULL_RETRY_S = 5.0


class Roll:
    """Keeps programs of all tenants apart, and everything within bounds. Those used last come last."""

    def __init__(self, max_programs: int) -> None:
        self._max_programs = max_programs
        self._live: OrderedDict[tuple[str, str], LiveProgram] = OrderedDict()
        self._by_id: dict[str, LiveProgram] = {}
        self._by_tenant: dict[str, OrderedDict[str, LiveProgram]] = {}
        self._by_end: dict[tuple[str, Digest], LiveProgram] = {}
        self._ended: OrderedDict[tuple[str, str], LiveProgram] = OrderedDict()
        self._num_nodes: Counter[str] = Counter()
        self._num_ended_nodes = 0

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[LiveProgram]:
        return iter(tuple(self._live.values()))

    def of(self, tenant: Tenant) -> Iterator[LiveProgram]:
        """A tenant's live programs."""
        return iter(tuple(self._by_tenant.get(tenant.name, {}).values()))

    def find(self, tenant: Tenant, public_id: str) -> LiveProgram | None:
        """The tenant's live program of that id."""
        return self._live.get((tenant.name, public_id))

    def find_ended(self, tenant: Tenant, public_id: str) -> LiveProgram | None:
        """The tenant's program of that id that has ended, if that was not long ago."""
        return self._ended.get((tenant.name, public_id))

    def find_by_scheduler_id(self, program_id: str) -> LiveProgram | None:
        """The live program that the scheduler knows by that id."""
        return self._by_id.get(program_id)

    def find_continued(self, tenant: Tenant, messages: Sequence[Message]) -> LiveProgram | None:
        """The program whose conversation the messages continue: of several, the one that they follow furthest."""
        found = None
        for digest in digests(messages):
            found = self._by_end.get((tenant.name, digest), found)
        return found

    def add(self, program: LiveProgram) -> None:
        """A program was opened."""
        key = program.tenant.name, program.public_id
        assert key not in self._live, f"program {program.public_id!r} is open already"
        self._live[key] = self._by_id[program.id] = program
        self._by_tenant.setdefault(program.tenant.name, OrderedDict())[program.public_id] = program
        before = self._ended.get(key)
        if before is not None:
            self.forget(before)

    def use(self, program: LiveProgram, now: float) -> None:
        """Something was heard of a program."""
        program.last_used = now
        self._live.move_to_end((program.tenant.name, program.public_id))
        self._by_tenant[program.tenant.name].move_to_end(program.public_id)

    def add_node(self, program: LiveProgram, node: ProgramNode) -> None:
        """A program has a node more."""
        program.nodes[node.id] = node
        self._num_nodes[program.tenant.name] += 1

    def has_room_for_nodes(self, program: LiveProgram) -> bool:
        """Whether a program may have another node: each is remembered here and in the scheduler until its end."""
        return len(program.nodes) < MAX_NODES and self._num_nodes[program.tenant.name] < MAX_TENANT_NODES

    def add_end(self, program: LiveProgram, digest: Digest, end: End) -> None:
        """A conversation of a program ended; who continues it belongs to the program."""
        program.ends[digest] = end
        program.ends.move_to_end(digest)
        self._by_end[program.tenant.name, digest] = program
        if len(program.ends) > MAX_ENDS:
            self._forget_end(program, program.ends.popitem(last=False)[0])

    def remove(self, program: LiveProgram) -> None:
        """A program has ended: nobody finds it any more but those who ask for what it used."""
        tenant, public_id = program.tenant.name, program.public_id
        del self._live[tenant, public_id], self._by_id[program.id], self._by_tenant[tenant][public_id]
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]
        for digest in program.ends:
            self._forget_end(program, digest)
        program.ends.clear()
        program.tools.clear()
        self._num_nodes[tenant] -= len(program.nodes)
        self._ended[tenant, public_id] = program
        self._num_ended_nodes += len(program.nodes)
        while len(self._ended) > MAX_ENDED or self._num_ended_nodes > MAX_ENDED_NODES:
            self.forget(next(iter(self._ended.values())))

    def forget(self, program: LiveProgram) -> None:
        """Nobody asks for a program that has ended."""
        key = program.tenant.name, program.public_id
        if self._ended.get(key) is program:
            del self._ended[key]
            self._num_ended_nodes -= len(program.nodes)

    def victim(self, tenant: Tenant) -> LiveProgram | None:
        """Who has to end before the tenant can begin another program; None if there is room.

        Raises `ApiError` 429 if nobody can.
        """
        own = self._by_tenant.get(tenant.name, OrderedDict())
        if tenant.max_programs is not None and len(own) >= tenant.max_programs:
            return _longest_idle(own, f"this key may have {tenant.max_programs} programs at once, and all of them run")
        if len(self._live) >= self._max_programs:
            most = max(self._by_tenant.values(), key=len)
            return _longest_idle(own if len(own) >= len(most) else most, "the server is full of programs that run")
        return None

    def _forget_end(self, program: LiveProgram, digest: Digest) -> None:
        key = program.tenant.name, digest
        if self._by_end.get(key) is program:
            del self._by_end[key]


def _longest_idle(programs: Mapping[str, LiveProgram], refusal: str) -> LiveProgram:
    """The program that is idle for longest; one that was opened on purpose, or waits for tools, at last."""
    idle = [program for program in programs.values() if not program.num_active]
    if not idle:
        text = f"{refusal}; end one, or try again later"
        raise ApiError(429, text, type="rate_limit_error", code="too_many_programs", retry_after=FULL_RETRY_S)
    # Who comes first is idle for longest.
    return min(idle, key=lambda program: (program.source == "api", bool(program.tools)))
