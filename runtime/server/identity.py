"""Which program a request belongs to: one table of the headers and fields that say so, the first that is there wins.

What a client says is never trusted beyond its own tenant: an id names a program of the tenant whose key came with it.
`docs/programs-over-http.md` shows the same table, and a test keeps the two equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import isfinite
from typing import Any, Literal, TypeAlias, cast

from treadle.runtime.server.errors import invalid

Objective: TypeAlias = Literal["latency", "throughput"]

MAX_ID_CHARACTERS = 256
MAX_PRIORITY = 10
MAX_DUE_S = 30 * 24 * 3600.0
THROUGHPUT_DUE_S = 3600.0
PRINTABLE = re.compile(r"[!-~]([ -~]*[!-~])?")
TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}.*")


@dataclass(frozen=True, slots=True)
class Source:
    """One way in which a request may name its program.

    Attributes:
        where: A header, or a field of the body with its path.
        sender: Who does it this way.
        parent, step, final: Names, in the same place, of the program that this one was begun by, of the part of the
            program that the request is, and of the flag that says that it is the last.
        is_own: It is Treadle's own word: an id that cannot be one is an error, and not something else's business.
        is_weak: It may name a request and not a program, so a conversation that goes on outweighs it.
    """

    where: Literal["header", "body"]
    name: str
    sender: str
    parent: str = ""
    step: str = ""
    final: str = ""
    is_own: bool = False
    is_weak: bool = False


CONTINUED = "previous_response_id"

SOURCES: tuple[Source, ...] = (
    Source(
        "header",
        "x-treadle-program-id",
        "anybody who wants to",
        "x-treadle-program-parent",
        "x-treadle-program-step",
        "x-treadle-program-final",
        is_own=True,
    ),
    Source("body", "program.id", "the same", "program.parent", "program.step", "program.final", is_own=True),
    Source("body", "program_id", "ThunderAgent", is_own=True),
    Source("header", "x-dynamo-session-id", "Dynamo", "x-dynamo-parent-session-id", final="x-dynamo-session-final"),
    Source("header", "x-claude-code-session-id", "Claude Code", step="x-claude-code-agent-id"),
    Source("header", "x-session-affinity", "OpenCode", "x-parent-session-id"),
    Source("header", "x-session-id", "OpenCode, Ray Serve, vLLM's router", "x-parent-session-id"),
    Source("header", "session-id", "Codex"),
    Source("header", "session_id", "Codex before 2026"),
    Source("header", "x-litellm-session-id", "LiteLLM, OpenHands"),
    Source("header", "x-llm-d-inference-fairness-id", "llm-d"),
    Source("header", "x-gateway-inference-fairness-id", "llm-d, Gateway API inference extension"),
    Source("body", CONTINUED, "the Responses API; the program of that response"),
    Source("body", "prompt_cache_key", "OpenAI Agents SDK, Strands, and others"),
    Source("body", "metadata.program_id", "anybody"),
    Source("body", "metadata.session_id", "anybody"),
    Source("body", "metadata.thread_id", "LangGraph"),
    Source("header", "traceparent", "W3C Trace Context; the trace id", is_weak=True),
)
"""In the order of precedence. What none of them names belongs to the program whose conversation it continues."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a request says of its program.

    Attributes:
        program_id: The client's name for it; None if it gave none.
        source: Where that stood, as `header:x-session-id`; "inferred" if nowhere.
        is_weak: Whether a conversation that goes on says more.
        parent: The program that this one was begun by, for people.
        step: The part of the program that the request is: names its node.
        final: Whether the program is over with this request.
        kind: Programs of one kind behave alike.
        priority: Higher goes first.
        due_s: Seconds from now by which the program should be over.
    """

    program_id: str | None = None
    source: str = "inferred"
    is_weak: bool = False
    parent: str | None = None
    step: str | None = None
    final: bool = False
    kind: str | None = None
    priority: int = 0
    due_s: float | None = None


def identify(headers: Mapping[str, str], body: Mapping[str, Any], *, continues: str | None = None) -> Identity:
    """Reads a request.

    Args:
        headers: By lower-case names, or without regard to case.
        continues: The program of the response that `previous_response_id` names, if there is one.

    Raises `ApiError` 400 for a field of Treadle's own that cannot be what it should.
    """
    wishes = _wishes(headers, body)

    def told(*sources: Source) -> dict[str, Any]:
        return _told_by(sources, headers, body)

    for source in SOURCES:
        given = _look_up(source.where, source.name, headers, body)
        if source.name == CONTINUED:
            given = continues if given is not None else None
        if source.name == "traceparent":
            given = _trace_id(given)
        if given is None or given == "":
            continue
        named = checked_id(given, source.name) if source.is_own else _usable_id(given)
        return Identity(named, f"{source.where}:{source.name}", source.is_weak, **told(source), **wishes)
    return Identity(**told(), **wishes)


def _told_by(sources: Sequence[Source], headers: Mapping[str, str], body: Mapping[str, Any]) -> dict[str, Any]:
    """What stands beside a name: the first parent and step that these sources, or Treadle's own words, give. That a
    request is the last may be said in anybody's words, whoever named the program."""
    trusted = (*sources, *(source for source in SOURCES if source.is_own))
    parents = (_short_text(_look_up(source.where, source.parent, headers, body)) for source in trusted)
    steps = (_short_text(_look_up(source.where, source.step, headers, body)) for source in trusted)
    return {
        "parent": next(filter(None, parents), None),
        "step": next(filter(None, steps), None),
        "final": any(_is_true(_look_up(source.where, source.final, headers, body)) for source in SOURCES),
    }


def checked_id(given: Any, param: str) -> str:
    """An id that a client chose, if it can be one: it must be fit to stand in a header of the answer.

    Raises `ApiError` 400.
    """
    if not isinstance(given, str) or len(given) > MAX_ID_CHARACTERS or not PRINTABLE.fullmatch(given):
        raise invalid(f"{param}: an id of a program is 1 to {MAX_ID_CHARACTERS} printable ASCII characters", param)
    return given


def _usable_id(given: Any) -> str:
    """An id that others made for their own use; one that does not fit here is replaced by its digest."""
    text = given if isinstance(given, str) else repr(given)
    if len(text) <= MAX_ID_CHARACTERS and PRINTABLE.fullmatch(text):
        return text
    return "sha256-" + sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def _wishes(headers: Mapping[str, str], body: Mapping[str, Any]) -> dict[str, Any]:
    """What a request says of the program's urgency and kind, wherever."""
    objective = _look_up("body", "program.objective", headers, body)
    if objective not in (None, "latency", "throughput"):
        raise invalid("program.objective: give latency or throughput", "program.objective")
    tier = body.get("service_tier")
    due_s = _own_number("program.deadline_s", headers, body, 0.001, MAX_DUE_S)
    if due_s is None and (objective == "throughput" or (objective is None and tier == "flex")):
        due_s = THROUGHPUT_DUE_S
    kind = _look_up("body", "program.kind", headers, body)
    if kind is not None:
        kind = checked_id(kind, "program.kind")
    return {"kind": kind, "priority": _priority(headers, body, tier), "due_s": due_s}


def _priority(headers: Mapping[str, str], body: Mapping[str, Any], tier: Any) -> int:
    """Treadle's own word, else Dynamo's hint, else vLLM's field, in which a lower number is sooner, else the tier."""
    own = _own_number("program.priority", headers, body, -MAX_PRIORITY, MAX_PRIORITY)
    if own is not None:
        return int(own)
    for path, sign in (("nvext.agent_hints.priority", 1), ("priority", -1)):
        given = _look_up("body", path, headers, body)
        if _is_number(given):
            return int(max(-MAX_PRIORITY, min(MAX_PRIORITY, sign * given)))
    return 1 if tier == "priority" else 0


def _own_number(
    path: str, headers: Mapping[str, str], body: Mapping[str, Any], least: float, most: float
) -> float | None:
    given = _look_up("body", path, headers, body)
    if given is None:
        return None
    if not _is_number(given) or not least <= given <= most:
        raise invalid(f"{path}: give a number from {least:g} to {most:g}", path)
    return cast(float, given)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _look_up(where: str, name: str, headers: Mapping[str, str], body: Mapping[str, Any]) -> Any:
    """What stands in a header, or at a path in the body; None if nothing does."""
    if not name:
        return None
    if where == "header":
        return headers.get(name)
    place: Any = body
    for part in name.split("."):
        if not isinstance(place, Mapping):
            return None
        place = place.get(part)
    return place


def _trace_id(given: Any) -> str | None:
    match = TRACE.fullmatch(given) if isinstance(given, str) else None
    return match[1] if match is not None and match[1].strip("0") else None


def _short_text(given: Any) -> str | None:
    """What people may be shown; None for what is no text: headers may bring any bytes."""
    return given[:MAX_ID_CHARACTERS] if isinstance(given, str) and given.isprintable() and given else None


def _is_true(given: Any) -> bool:
    return given is True or (isinstance(given, str) and given.lower() in ("1", "true"))
