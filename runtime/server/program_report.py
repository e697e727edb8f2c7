"""One program in detail: what it used, what it keeps, and why it waits, from what the engine says of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from treadle.runtime.server.program import LiveProgram

CALL_ID = re.compile(r"\bcall-\d+\b")


def report_of(program: LiveProgram, inspected: Mapping[str, Any], now: float) -> dict[str, Any]:
    """The program as its owner sees it.

    Args:
        inspected: What `Session.inspect` says of it; empty if it has ended, or the engine does not know it.
    """
    account = program.account.to_json() if program.account is not None else _account_so_far(inspected)
    calls = inspected.get("calls", {})
    decisions = list(_own_decisions(program, inspected.get("decisions", ()), calls))
    leases = [_lease(lease) for lease in inspected.get("leases", ())]
    return {
        **program.to_json(now),
        "account": account,
        "calls": [_call(call_id, call) for call_id, call in calls.items()],
        "leases": leases,
        "leased_pages": inspected.get("leased_pages", 0),
        "why": list(_why(program, calls, leases, now)),
        "decisions": decisions,
    }


def _account_so_far(inspected: Mapping[str, Any]) -> dict[str, Any] | None:
    if not inspected:
        return None
    return {
        "duration_s": inspected["age_s"],
        "calls": inspected["num_calls"],
        "nodes": inspected["num_nodes"],
        **inspected["usage"],
    }


def _call(call_id: str, call: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": call_id,
        "node": call["node_id"],
        "status": call["status"],
        "prompt_tokens": call["prompt_tokens"],
        "computed_tokens": call["computed_tokens"],
        "generated_tokens": call["generated_tokens"],
        "waits_s": call["waits_s"],
        "reason": without_others(call["wait_reason"], {call_id}) or None,
    }


def _lease(lease: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "call": lease["owner"],
        "tokens": lease["tokens"],
        "kept_tokens": lease["known_tokens"],
        "rests_s": lease["rests_s"],
        "waits_for": lease["waits_for"],
        "expected_s": lease["expected_s"],
        "retained_s": lease["retained_s"],
    }


def _why(
    program: LiveProgram, calls: Mapping[str, Any], leases: Sequence[Mapping[str, Any]], now: float
) -> Iterator[str]:
    """What it does and what keeps it from going on, in sentences."""
    if program.ended is not None:
        yield f"It has ended: {program.end_reason}."
        return
    for call_id, call in calls.items():
        done = f"{call['computed_tokens']} of {call['prompt_tokens']} prompt tokens are computed"
        if call["status"] == "waiting":
            reason = without_others(call["wait_reason"], {call_id}) or "its turn has not come"
            yield f"{call_id} waits for the engine since {call['waits_s']:.1f} s: {reason}."
        elif call["generated_tokens"]:
            yield f"{call_id} has generated {call['generated_tokens']} tokens."
        else:
            yield f"{call_id} runs: {done}."
    for node in program.tools.values():
        yield f"It waits for the tool {node.name} since {now - node.began:.1f} s (call {node.call_id})."
    if program.state == "person":
        yield f"It waits for its next request; nothing was heard of it for {now - program.last_used:.1f} s."
    if program.state == "idle":
        yield "No request of it has come yet."
    for lease in leases:
        if lease["waits_for"] is None:
            continue
        yield f"{lease['kept_tokens']} of {lease['tokens']} tokens of {lease['call']} are kept; {_until(lease)}."


def _until(lease: Mapping[str, Any]) -> str:
    if lease["retained_s"] is not None:
        return f"a hint retains them for {lease['retained_s']:.1f} s"
    if lease["expected_s"] is None:
        return "a hint has them give way before others"
    return f"it is expected back in {lease['expected_s']:.1f} s"


def _own_decisions(
    program: LiveProgram, decisions: Sequence[Mapping[str, Any]], calls: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """What was decided of its calls, and of itself, by the name that its owner knows."""
    own = {*calls, *(decision["subject"] for decision in decisions)}
    for decision in decisions:
        subject = program.public_id if decision["subject"] == program.id else decision["subject"]
        yield {**decision, "subject": subject, "reason": without_others(decision["reason"], own)}


def without_others(reason: str, own: set[str]) -> str:
    """A reason in which no call of another program, perhaps of another tenant, is named."""
    return CALL_ID.sub(lambda match: match[0] if match[0] in own else "another call", reason)
