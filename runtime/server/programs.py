"""The live programs of all tenants: found or opened for a request, told to the scheduler as they grow, ended.

    request     turn                                        scheduler
    -------     ----                                        ---------
    messages -> begin_turn: what they bring back   -------> Resume(tool) ..., DeclareNode(turn)
                calls of the model                 -------> SubmitCall ...
    answer   <- end_turn: what it asks for         -------> DeclareNode(tool), Wait(tool) ...
                                                            or DeclareNode(person), Wait(person)

So the scheduler knows what a program waits for, and since when, without anybody saying so: a turn that ended with tool
calls waits for them, until a request brings their ids back; another one waits for a person.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from treadle.runtime.engine.session import Session
from treadle.runtime.errors import TreadleError
from treadle.runtime.executor.account import Account
from treadle.runtime.server.conversations import EMPTY, Digest, Message, RecordedIds, digests, extended
from treadle.runtime.server.errors import ApiError
from treadle.runtime.server.identity import Identity
from treadle.runtime.server.program import End, LiveProgram, NodeKind, ProgramNode, TurnNode
from treadle.runtime.server.program_report import without_others
from treadle.runtime.server.roll import Roll
from treadle.runtime.server.tenants import Tenant
from treadle.scheduler import DUE_S, DeclareNode, OpenProgram, ProgramEnded, Resume, Wait

MAX_OVER_TOOLS = 1024
MIN_DUE_S = 60.0
"""The soonest that a tenant's programs may be due who is not an admin."""

Watcher: TypeAlias = Callable[[str, str, Mapping[str, Any]], None]
"""Called with the name of a tenant, what happened, and to what: `Feed.publish` is one."""


class Programs:
    """Finds, opens and ends programs. All of it happens on the loop's thread, in one turn of it unless awaited.

    There are at most `max_programs`, and each tenant has its own bound: a further one takes the place of an idle one of
    the same tenant, or, if all are full, of the tenant that has the most. One that nothing was heard of for `idle_s`
    ends by itself.

    Attributes:
        watchers: Told of all that happens. `admit` is asked before a tenant begins another program.
        recorded: What models wrote, for prompts that extend the last one exactly.
    """

    def __init__(
        self,
        session: Session,
        *,
        max_programs: int = 4096,
        idle_s: float = 600.0,
        watchers: Sequence[Watcher] = (),
        admit: Callable[[Tenant], None] = lambda tenant: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.watchers = list(watchers)
        self._admit = admit
        self.recorded = RecordedIds()
        self._session = session
        self._idle_s = idle_s
        self._clock = clock
        self._roll = Roll(max_programs)
        self._ids = itertools.count(1)
        self._closing: dict[str, asyncio.Task[None]] = {}

    @property
    def now(self) -> float:
        """The time by the clock that all times of programs are of."""
        return self._clock()

    # Finding and opening

    async def enter(self, tenant: Tenant, identity: Identity, messages: Sequence[Message] | None = None) -> LiveProgram:
        """The program of a request: the one that it names, else the one whose conversation it continues, else a new
        one. What is named weakly is looked for by its conversation first.

        Raises `ApiError` 429 if the tenant may have no more.
        """
        name = identity.program_id
        program: LiveProgram | None = None
        if messages and (name is None or identity.is_weak):
            program = self._roll.find_continued(tenant, messages)
        if program is None and name is not None:
            program = self.find(tenant, name)
        if program is None:
            program = self.open(tenant, identity)
        self._roll.use(program, self.now)
        if identity.step is not None:
            program.step = identity.step
        return program

    def open(self, tenant: Tenant, identity: Identity) -> LiveProgram:
        """Opens a program, under the name given or one that nobody can guess. It must not be open already.

        Raises `ApiError` 429 if the tenant may have no more, and what `admit` raises.
        """
        self._admit(tenant)
        victim = self._roll.victim(tenant)
        if victim is not None:
            self.end_soon(victim, "made room")
        priority, due_s = identity.priority, DUE_S if identity.due_s is None else identity.due_s
        if not tenant.is_admin:  # it must not push others back for long
            priority, due_s = min(0, priority), max(MIN_DUE_S, due_s)
        program = LiveProgram(
            id=f"program-{next(self._ids)}-{secrets.token_hex(4)}",
            public_id=identity.program_id or f"prog_{secrets.token_hex(12)}",
            tenant=tenant,
            source=identity.source,
            kind=identity.kind or "",
            parent=identity.parent,
            priority=priority,
            due_s=due_s,
            opened=self.now,
            created_at=time.time(),
            last_used=self.now,
        )
        kind = f"{tenant.name}/{program.kind}" if tenant.name else program.kind
        self._session.send(OpenProgram(program.id, kind, tenant.name, priority, due_s))
        self._roll.add(program)
        self.tell(program, "program.opened", {"source": program.source, "kind": program.kind, "parent": program.parent})
        return program

    def find(self, tenant: Tenant, public_id: str) -> LiveProgram | None:
        """The tenant's live program of that id."""
        return self._roll.find(tenant, public_id)

    def find_ended(self, tenant: Tenant, public_id: str) -> LiveProgram | None:
        """The tenant's program of that id that has ended, if that was not long ago."""
        return self._roll.find_ended(tenant, public_id)

    def live(self, tenant: Tenant) -> Iterator[LiveProgram]:
        """The tenant's programs; those of which nothing was heard for longest come first."""
        return self._roll.of(tenant)

    def states(self) -> Mapping[str, int]:
        """How many live programs of all tenants are in each state."""
        counts = dict.fromkeys(("running", "tool", "person", "idle"), 0)
        for program in self._roll:
            counts[program.state] += 1
        return counts

    def __len__(self) -> int:
        return len(self._roll)

    # Turns

    def begin_turn(
        self, program: LiveProgram, identity: Identity, messages: Sequence[Message] | None = None, name: str = "turn"
    ) -> TurnNode:
        """A turn begins. What the messages bring back has ended: the tools, or the person, that the conversation waited
        for. `leave_turn` must follow, however it ends.

        Raises `ApiError` 409 if the program has ended meanwhile.
        """
        if program.ended is not None:
            raise ApiError(409, f"program {program.public_id!r} has ended; begin another one", code="program_ended")
        so_far, end = EMPTY, None
        for digest in digests(messages or ()):
            so_far, end = digest, program.ends.get(digest, end)
        inputs = self._come_back(program, end) if end is not None else ()
        inputs = tuple(dict.fromkeys((*inputs, *self._results(program, messages or ()))))
        extends = end.node_id if end is not None else None
        node = self.begin_node(program, "llm", identity.step or program.step or name, inputs, extends=extends)
        program.num_active += 1
        program.num_turns += 1
        self._roll.use(program, self.now)
        self.tell(program, "turn.started", {"node": node.id if node is not None else None, "name": name})
        return TurnNode(
            program,
            node.id if node is not None else None,
            end.call_id if end is not None else None,
            so_far if messages is not None else None,
            identity.final,
        )

    def end_turn(
        self, node: TurnNode, *, call_id: str, message: Message, token_ids: Sequence[int], finish_reason: str
    ) -> None:
        """One answer of a turn is complete: `message` is what the client will send back. Tools that it calls begin."""
        program = node.program
        if program.ended is not None:
            return
        if node.so_far is not None:
            self._rest(node, node.so_far, call_id, message, token_ids)
        self.tell(program, "turn.finished", {"node": node.node_id, "reason": finish_reason, "tokens": len(token_ids)})

    def _rest(self, node: TurnNode, so_far: Digest, call_id: str, message: Message, token_ids: Sequence[int]) -> None:
        """A conversation came to rest with a message, until tools or a person have answered it."""
        program = node.program
        self.recorded.put(program.id, message, token_ids)
        end = End(node.node_id, call_id)
        inputs = (node.node_id,) if node.node_id is not None else ()
        for call in message.get("tool_calls") or ():
            tool = self.begin_tool(program, call["id"], call["function"]["name"], inputs)
            if tool is not None:
                end.waits.append(tool)
        if not message.get("tool_calls") and not node.is_final:
            person = self.begin_node(program, "person", "person", inputs)
            if person is not None:
                end.waits.append(person)
        self._roll.add_end(program, extended(so_far, message), end)

    def leave_turn(self, node: TurnNode, *, failed: bool = False) -> None:
        """A turn is over, with all its answers or without. A program whose last turn it was ends."""
        if node.is_over:
            return
        node.is_over, program = True, node.program
        program.num_active -= 1
        if node.node_id is not None:
            turn = program.nodes[node.node_id]
            turn.ended, turn.state = self.now, "failed" if failed else "done"
        if program.ended is not None:
            return
        self._roll.use(program, self.now)
        if failed:
            self.tell(program, "turn.failed", {"node": node.node_id})
        program.is_final = program.is_final or node.is_final
        if program.is_final and not program.num_active:
            self.end_soon(program, "said to be final")

    def _come_back(self, program: LiveProgram, end: End) -> tuple[str, ...]:
        """A conversation goes on where it ended: what it waited for is there, and nobody waits for the turn's other
        answers. Returns the nodes that the next turn needs."""
        for other in program.ends.values():
            if other is end or (end.node_id is not None and other.node_id == end.node_id):
                for wait in other.waits:
                    self.end_node(program, wait)
        waited = tuple(wait.id for wait in end.waits)
        return waited or ((end.node_id,) if end.node_id is not None else ())

    def _results(self, program: LiveProgram, messages: Sequence[Message]) -> list[str]:
        """Ends the tools whose calls these messages answer, whatever else they say. Returns their nodes."""
        answered = [message.get("tool_call_id") for message in messages if message.get("role") == "tool"]
        tools = [program.tools[call_id] for call_id in answered if call_id in program.tools]
        for tool in tools:
            self.end_node(program, tool)
        return [tool.id for tool in tools]

    # Nodes

    def begin_tool(
        self,
        program: LiveProgram,
        call_id: str,
        name: str,
        inputs: Sequence[str] = (),
        typical_s: float | None = None,
    ) -> ProgramNode | None:
        """A tool begins to run. None if it runs already, or the program has no room for more nodes."""
        if call_id in program.tools:
            return None
        node = self.begin_node(program, "tool", name, inputs, call_id=call_id, typical_s=typical_s)
        if node is not None:
            program.tools[call_id] = node
            self.tell(program, "tool.started", {"node": node.id, "tool": name, "call_id": call_id})
        return node

    def begin_node(
        self,
        program: LiveProgram,
        kind: NodeKind,
        name: str,
        inputs: Sequence[str],
        *,
        extends: str | None = None,
        call_id: str | None = None,
        typical_s: float | None = None,
    ) -> ProgramNode | None:
        """Adds a node to the program's graph, here and in the scheduler, which waits for what is outside of it."""
        if not self._roll.has_room_for_nodes(program):
            return None
        node = ProgramNode(f"{kind}-{len(program.nodes) + 1}", kind, name, tuple(inputs), self.now, extends, call_id)
        self._session.send(
            DeclareNode(program.id, node.id, kind, name, node.inputs, extends, typical_s=typical_s),
            *([] if kind == "llm" else [Wait(program.id, node.id)]),
        )
        self._roll.add_node(program, node)
        return node

    def end_node(self, program: LiveProgram, node: ProgramNode, *, failed: bool = False) -> None:
        """What a program waited for has come. Once is enough."""
        if node.ended is not None:
            return
        node.ended, node.state = self.now, "failed" if failed else "done"
        self._session.send(Resume(program.id, node.id))
        if node.call_id is not None:
            program.tools.pop(node.call_id, None)
            program.over_tools[node.call_id] = None
            if len(program.over_tools) > MAX_OVER_TOOLS:
                program.over_tools.popitem(last=False)
            seconds = round(node.ended - node.began, 6)
            told = {"node": node.id, "tool": node.name, "call_id": node.call_id, "seconds": seconds, "failed": failed}
            self.tell(program, "tool.ended", told)

    def heard(self, program: LiveProgram, keep_s: float = 0.0) -> None:
        """A client told something of a program: it is idle only from now on, and kept for `keep_s` at least."""
        if program.ended is None:
            self._roll.use(program, self.now)
            program.keep_until = max(program.keep_until, self.now + keep_s)

    # Ending

    async def end(self, program: LiveProgram, reason: str = "ended by its owner") -> Account | None:
        """Ends a program: its calls are aborted, nobody finds it any more. Returns its account, if there is an engine
        left to give one. It ends although whoever asked for it does not wait."""
        self.end_soon(program, reason)
        closing = self._closing.get(program.id)
        if closing is not None:
            await asyncio.shield(closing)
        return program.account

    def forget(self, program: LiveProgram) -> None:
        """Nobody will ask for a program that has ended."""
        self._roll.forget(program)

    def end_soon(self, program: LiveProgram, reason: str) -> None:
        """The same, without waiting for the account. What has ended stays as it is."""
        if program.ended is None:
            self._take_out(program, reason)
            ending = self._close_account(program, self._send_end(program))
            task = asyncio.create_task(ending, name=f"treadle end {program.id}")
            self._closing[program.id] = task
            task.add_done_callback(lambda _: self._closing.pop(program.id))

    def _take_out(self, program: LiveProgram, reason: str) -> None:
        program.ended, program.end_reason = self.now, reason
        self._roll.remove(program)
        self.recorded.forget(program.id)

    def _send_end(self, program: LiveProgram) -> asyncio.Future[ProgramEnded] | None:
        """Sent at once, so that whoever takes its place comes after it. None if there is no engine left."""
        try:
            return self._session.end_program(program.id)
        except TreadleError:
            return None

    async def _close_account(self, program: LiveProgram, ending: asyncio.Future[ProgramEnded] | None) -> None:
        with contextlib.suppress(TreadleError):  # there may be no engine left
            if ending is not None:
                num_tools = sum(node.kind == "tool" for node in program.nodes.values())
                program.account = Account.of(await ending, num_tools, 0.0)
        account = program.account.to_json() if program.account is not None else None
        self.tell(program, "program.ended", {"kind": program.kind, "reason": program.end_reason, "account": account})

    async def expire(self) -> None:
        """Ends programs that nothing was heard of for too long, for ever. For a task of the server's."""
        while True:
            await asyncio.sleep(min(1.0, self._idle_s / 4))
            self.expire_now()

    def expire_now(self) -> None:
        """Ends programs that nothing was heard of for too long."""
        for program in self._roll:
            if self.now - program.last_used < self._idle_s:
                break
            if not program.num_active and self.now >= program.keep_until:
                self.end_soon(program, f"idle for {self._idle_s:g} s")

    async def relay_decisions(self) -> None:
        """Tells what the scheduler decides of programs, while there is an engine. For a task of the server's."""
        async for decision in self._session.decisions():
            program = self._roll.find_by_scheduler_id(decision.program_id)
            if program is not None:
                reason = without_others(decision.reason, {decision.subject})
                subject = None if decision.subject == program.id else decision.subject
                self.tell(program, "decision", {"action": decision.action, "call": subject, "reason": reason})

    async def close(self) -> None:
        """Ends all programs."""
        for program in self._roll:
            self.end_soon(program, "the server ends")
        await asyncio.gather(*self._closing.values(), return_exceptions=True)

    def tell(self, program: LiveProgram, kind: str, data: Mapping[str, Any]) -> None:
        """Tells the watchers what happened to a program."""
        for watcher in self.watchers:
            watcher(program.tenant.name, kind, {"program": program.public_id, **data})
