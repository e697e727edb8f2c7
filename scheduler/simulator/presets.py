"""Policies by name: parts joined by `+`, or a preset that is named after whose rules it follows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from treadle.scheduler.policies import ADMISSIONS, ORDERS, RETENTIONS

CLAIRVOYANT = "clairvoyant"

# The classes in `scheduler/policies` name the sources.
PRESETS = {
    "vllm": "fcfs+lru+greedy",
    "program-fcfs": "program-fcfs+lru+greedy",
    "plas": "plas+lru+greedy",
    "atlas": "atlas+lru+greedy",
    "continuum": "continuum+continuum+greedy",
    "continuum-released": "continuum+continuum-released+greedy",
    "thunderagent": "program-fcfs+lru+pause-resume",
    "concur": "program-fcfs+lru+aimd",
    "fixed": "program-fcfs+fixed:60+greedy",
    "treadle": "treadle+treadle+treadle",
    CLAIRVOYANT: "treadle+treadle+treadle",
}


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy as it was asked for, and what it consists of. A clairvoyant one knows pauses and lengths of outputs."""

    name: str
    order: str
    retention: str
    admission: str
    clairvoyant: bool = False

    @property
    def rule(self) -> str:
        """`ORDER+RETENTION+ADMISSION`."""
        return f"{self.order}+{self.retention}+{self.admission}"


def policy(name: str) -> Policy:
    """The policy of a preset's name, or of `ORDER+RETENTION[+ADMISSION]`; without admission it is greedy.

    A part may have an argument after a colon: `program-fcfs+fixed:60`.

    Raises:
        ValueError: there is no such preset or part; the text has the nearest names.
    """
    parts = PRESETS.get(name, name).split("+")
    if len(parts) == 1:
        raise ValueError(f"no policy is called {name!r}; nearest: {_nearest(name, PRESETS)}; or ORDER+RETENTION")
    if len(parts) > 3:
        raise ValueError(f"{name!r} has {len(parts)} parts; a policy is ORDER+RETENTION or ORDER+RETENTION+ADMISSION")
    if len(parts) == 2:
        parts.append("greedy")
    for kind, part, known in zip(
        ("order", "retention", "admission"), parts, (ORDERS, RETENTIONS, ADMISSIONS), strict=True
    ):
        word, _, argument = part.partition(":")
        if word not in known:
            raise ValueError(f"{name!r}: no {kind} is called {word!r}; nearest: {_nearest(word, known)}")
        if argument and not _is_number(argument):
            raise ValueError(f"{name!r}: {argument!r} after {word!r} is not a number of at least 0")
    order, retention, admission = parts
    return Policy(name, order, retention, admission, clairvoyant=name == CLAIRVOYANT)


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    return ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names)


def _is_number(text: str) -> bool:
    try:
        return 0 <= float(text) < float("inf")
    except ValueError:
        return False
