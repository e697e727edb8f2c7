"""A context-free grammar under construction: named rules, pruned of what can never end, written out as GBNF."""

from __future__ import annotations

from dataclasses import dataclass, field

from treadle.grammar.errors import GrammarTooLargeError

MAX_ALTERNATIVES = 50_000
MAX_TEXT = 2 << 20

_QUOTED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def literal(text: str) -> str:
    """`text` as a GBNF literal; empty text as the empty literal."""
    return '"' + "".join(_QUOTED.get(char) or (char if char >= " " else f"\\x{ord(char):02x}") for char in text) + '"'


@dataclass(slots=True)
class Alternative:
    """One right-hand side: GBNF text, and the rules without which it cannot be completed."""

    text: str
    needs: tuple[str, ...] = ()


@dataclass(slots=True)
class Rules:
    """Rules by name. A rule without alternatives matches nothing; whatever needs it is pruned."""

    alternatives: dict[str, list[Alternative]] = field(default_factory=dict)
    _num_alternatives: int = 0

    def define(self, name: str, alternatives: list[Alternative]) -> None:
        """Raises `GrammarTooLargeError` once the grammar is past its bound."""
        self._num_alternatives += len(alternatives)
        if self._num_alternatives > MAX_ALTERNATIVES:
            raise GrammarTooLargeError("alternatives in the grammar", self._num_alternatives, MAX_ALTERNATIVES)
        self.alternatives[name] = alternatives

    def completable(self) -> set[str]:
        """The rules that match some finite text."""
        waiting: dict[str, list[tuple[str, Alternative]]] = {}
        missing = {}
        ready: list[str] = []
        for name, alternatives in self.alternatives.items():
            for alternative in alternatives:
                needs = set(alternative.needs)
                missing[id(alternative)] = len(needs)
                for needed in needs:
                    waiting.setdefault(needed, []).append((name, alternative))
                if not needs:
                    ready.append(name)
        found: set[str] = set()
        while ready:
            name = ready.pop()
            if name in found:
                continue
            found.add(name)
            for owner, alternative in waiting.get(name, ()):
                missing[id(alternative)] -= 1
                if not missing[id(alternative)]:
                    ready.append(owner)
        return found

    def text(self, start: str) -> str:
        """The GBNF of everything reachable from `start`, or "" if `start` matches nothing.

        Raises `GrammarTooLargeError`.
        """
        completable = self.completable()
        if start not in completable:
            return ""
        lines: list[str] = []
        reached, queue, size = {start}, [start], 0
        while queue:
            name = queue.pop()
            kept = [a for a in self.alternatives[name] if completable.issuperset(a.needs)]
            lines.append(f"{name} ::= " + " | ".join(dict.fromkeys(a.text for a in kept)))
            size += len(lines[-1])
            if size > MAX_TEXT:
                raise GrammarTooLargeError("characters in the grammar", size, MAX_TEXT)
            for alternative in kept:
                fresh = [needed for needed in alternative.needs if needed not in reached]
                reached.update(fresh)
                queue.extend(dict.fromkeys(fresh))
        return "\n".join(lines) + "\n"
