"""What a scheduler looks like from outside, in values that JSON knows: pages, calls, programs, and why they wait.

::

    {"pages":    {"total", "free", "running", "leased", "cached", "host_total", "host_used"},
     "calls":    {"running", "waiting", "parked"},
     "tenants":  {tenant: {"programs", "running_pages", "leased_pages"}},
     "programs": {program: {"kind", "tenant", "state", "priority", "due_in_s", "age_s", "num_calls", "num_nodes",
                            "outside", "usage", "leased_pages",
                            "calls", "leases", "nodes", "decisions"}}}     the last line: of one that was asked for

Every page is counted once: `running` if a running call holds it, `leased` if only programs that will come back want it,
`cached` if nobody does. Times are seconds before or from now, and None where there is no end in sight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from treadle.scheduler.call import Call, Program, Status, Tally
from treadle.scheduler.commands import Decision
from treadle.scheduler.kv import Lease, Node
from treadle.scheduler.policies.books import Books


def inspect(books: Books, decisions: Iterable[Decision], subject: str | None, now: float) -> dict[str, Any]:
    """The report on everything, or on one program in detail. A subject that is not there leaves `programs` empty."""
    seen: set[Node] = set()
    tenants: dict[str, dict[str, int]] = {}
    for call in books.roster.running:
        tenant = _tenant(tenants, call.program.tenant)
        tenant["running_pages"] += _untaken(call.node, seen) + len(call.pages) - call.num_tree_pages
    leased = dict.fromkeys(books.programs, 0)
    for lease in books.leases.values():
        pages = _untaken(lease.node, seen)
        leased[lease.program_id] += pages
        _tenant(tenants, lease.tenant)["leased_pages"] += pages
    for program in books.programs.values():
        _tenant(tenants, program.tenant)["programs"] += 1
    shown = books.programs.values() if subject is None else filter(None, (books.programs.get(subject),))
    programs = {program.id: _program(program, leased[program.id], now) for program in shown}
    if subject in programs:
        programs[subject] |= _details(books, books.programs[subject], decisions, now)
    calls = [call for program in books.programs.values() for call in program.calls.values()]
    return {
        "pages": _pages(books, sum(leased.values())),
        "calls": {
            status.value: sum(call.status is status for call in calls)
            for status in (Status.RUNNING, Status.WAITING, Status.PARKED)
        },
        "tenants": tenants,
        "programs": programs,
    }


def _tenant(tenants: dict[str, dict[str, int]], name: str) -> dict[str, int]:
    return tenants.setdefault(name, {"programs": 0, "running_pages": 0, "leased_pages": 0})


def _untaken(node: Node | None, seen: set[Node]) -> int:
    """Pages on the device from the root to a node, but for those of nodes seen before."""
    pages = 0
    while node is not None and node not in seen:
        seen.add(node)
        pages += len(node.pages)
        node = node.parent
    return pages


def _pages(books: Books, leased: int) -> dict[str, int]:
    memory = books.memory
    return {
        "total": memory.pool.num_pages,
        "free": memory.pool.num_free,
        "running": memory.pool.num_pages - memory.num_available,
        "leased": leased,
        "cached": memory.tree.num_evictable - leased,
        "host_total": memory.host.num_pages,
        "host_used": memory.host.num_pages - memory.host.num_free,
    }


def _program(program: Program, leased_pages: int, now: float) -> dict[str, Any]:
    tally = Tally()
    for part in (program.tally, *(call.tally for call in program.calls.values())):
        tally.add(part)
    return {
        "kind": program.kind,
        "tenant": program.tenant,
        "state": _state(program),
        "priority": program.priority,
        "due_in_s": program.due - now,
        "age_s": now - program.graph.opened,
        "num_calls": program.num_calls,
        "num_nodes": len(program.graph),
        "outside": program.graph.outside(now),
        "usage": tally.as_dict(),
        "leased_pages": leased_pages,
    }


def _state(program: Program) -> str:
    """`running`, `waiting` or `parked` as the foremost of its calls; without calls `outside` or `idle`."""
    statuses = {call.status for call in program.calls.values()}
    for status in (Status.RUNNING, Status.WAITING, Status.PARKED):
        if status in statuses:
            return str(status.value)
    return "outside" if program.graph.outside(0.0) else "idle"


def _details(books: Books, program: Program, decisions: Iterable[Decision], now: float) -> dict[str, Any]:
    return {
        "calls": {call.id: _call(call, now) for call in program.calls.values()},
        "leases": [_lease(books, lease, now) for lease in program.leases.values()],
        "nodes": program.graph.report(now),
        "decisions": [
            {"ago_s": now - d.time, "action": d.action, "subject": d.subject, "reason": d.reason}
            for d in decisions
            if d.program_id == program.id
        ],
    }


def _call(call: Call, now: float) -> dict[str, Any]:
    waits = call.status is Status.WAITING
    return {
        "node_id": call.node_id,
        "name": call.name,
        "status": call.status.value,
        "open": call.open,
        "prompt_tokens": call.num_prompt_tokens,
        "generated_tokens": call.num_generated,
        "computed_tokens": call.num_computed_tokens,
        "pages": len(call.pages),
        "waits_s": now - call.waiting_since if waits else None,
        "wait_reason": call.wait_reason if waits else "",
    }


def _lease(books: Books, lease: Lease, now: float) -> dict[str, Any]:
    pause = books.expected_pause(lease, now)
    return {
        "owner": lease.owner,
        "tokens": lease.num_tokens,
        "known_tokens": lease.num_known_tokens,
        "rests_s": now - lease.since,
        "waits_for": lease.pause[1] if lease.pause is not None else None,
        "expected_s": pause if math.isfinite(pause) else None,
        "retained_s": lease.retained_until - now if lease.retained_until > now else None,
    }
