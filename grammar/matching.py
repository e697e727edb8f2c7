"""Whether a pattern is found in a text, in time that the pattern cannot blow up."""

from __future__ import annotations

import re
from functools import lru_cache

from treadle.grammar.errors import GrammarTooLargeError, UnsupportedSchemaError
from treadle.grammar.pattern import Chars, Either, Node, Ranges, Repeat, UntranslatableError, parse

MAX_PATTERN = 1_024
MAX_STEPS = 2_000_000
MAX_BACKTRACKING = 10**8
MAX_DEGREE = 4


def check_pattern(pattern: str, pointer: str, *, as_key: bool) -> None:
    """Refuses patterns that cannot be matched in bounded time, `UnsupportedSchemaError`, or are too long.

    A pattern that repeats what repeats is followed state by state, if it is of the syntax known here and no key.
    """
    if len(pattern) > MAX_PATTERN:
        raise GrammarTooLargeError("characters of a pattern", len(pattern), MAX_PATTERN)
    if _degree(pattern) <= MAX_DEGREE:
        return
    advice = "It repeats a group that repeats, which can take for ever to match. Write it without nested repetitions."
    if as_key:
        raise UnsupportedSchemaError("patternProperties", f"{pointer}/patternProperties", advice)
    if not _automata(pattern):
        raise UnsupportedSchemaError("pattern", f"{pointer}/pattern", advice)


def is_found(pattern: str, text: str) -> bool:
    """As `re.search`. A text that would take too long counts as not matching."""
    degree = _degree(pattern)
    if degree <= MAX_DEGREE and len(text) ** degree <= MAX_BACKTRACKING:
        return re.search(pattern, text) is not None
    automata = _automata(pattern)
    if sum(len(automaton.steps) for automaton in automata) * len(text) > MAX_STEPS:
        return False
    return any(automaton.is_found(text) for automaton in automata)


class Automaton:
    """Thompson's simulation of one branch of a pattern: all states at once, so that nothing is tried twice."""

    def __init__(self, node: Node, *, from_start: bool, to_end: bool) -> None:
        # A step is a class of characters that leads to the next step, or a list of steps to go on from.
        self.steps: list[Ranges | list[int]] = []
        self._from_start = from_start
        self._to_end = to_end
        self._write(node)

    def is_found(self, text: str) -> bool:
        """Whether the branch matches somewhere, as its anchors allow."""
        final = len(self.steps)
        states = self._closure({0})
        for char in text:
            if final in states and not self._to_end:
                return True
            code = ord(char)
            moved = {
                state + 1
                for state in states
                if state < final
                and isinstance(step := self.steps[state], tuple)
                and any(low <= code <= high for low, high in step)
            }
            states = self._closure(moved if self._from_start else moved | {0})
        return final in states

    def _closure(self, states: set[int]) -> set[int]:
        queue = list(states)
        while queue:
            state = queue.pop()
            if state < len(self.steps) and isinstance(step := self.steps[state], list):
                fresh = [target for target in step if target not in states]
                states.update(fresh)
                queue += fresh
        return states

    def _write(self, node: Node) -> None:
        steps = self.steps
        if isinstance(node, Chars):
            steps.append(node.ranges)
        elif isinstance(node, Either):
            fork: list[int] = []
            steps.append(fork)
            exits: list[list[int]] = []
            for branch in node.nodes:
                fork.append(len(steps))
                self._write(branch)
                exits.append([])
                steps.append(exits[-1])
            for leave in exits:
                leave.append(len(steps))
        elif isinstance(node, Repeat):
            self._write_repeat(node)
        else:
            for child in node.nodes:
                self._write(child)

    def _write_repeat(self, node: Repeat) -> None:
        steps = self.steps
        for _ in range(node.least):
            self._write(node.node)
        skips: list[list[int]] = []
        for _ in range(1 if node.most is None else node.most - node.least):
            skip = [len(steps) + 1]
            skips.append(skip)
            steps.append(skip)
            start = len(steps) - 1
            self._write(node.node)
            if node.most is None:
                steps.append([start])
        for skip in skips:
            skip.append(len(steps))


@lru_cache(maxsize=256)
def _automata(pattern: str) -> tuple[Automaton, ...]:
    """The branches of a pattern, or nothing if it is not of the syntax known here."""
    try:
        branches = parse(pattern)
    except (UntranslatableError, GrammarTooLargeError):
        return ()
    return tuple(Automaton(b.node, from_start=b.from_start, to_end=b.to_end) for b in branches)


@lru_cache(maxsize=256)
def _degree(pattern: str) -> int:
    """The power of a text's length that backtracking may take: 1, and 1 for each repetition without a small bound.

    `MAX_DEGREE` + 1 if a group that matches texts of several lengths is itself repeated: that is exponential.
    """
    variable, degree = [False], 1
    at, in_class = 0, False
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
            at += pattern[at + 1 : at + 2] == "^"
        elif char == "(":
            variable.append(False)
            at += pattern[at + 1 : at + 2] == "?"
        elif char == ")" and len(variable) > 1:
            inner = variable.pop()
            if inner and _repeats_often(pattern, at + 1):
                return MAX_DEGREE + 1
            variable[-1] = variable[-1] or inner
        elif char in "*+?|{":
            variable[-1] = True
            degree += _repeats_often(pattern, at)
        at += 1
    return min(degree, MAX_DEGREE + 1)


def _repeats_often(pattern: str, at: int) -> bool:
    if pattern[at : at + 1] in ("*", "+"):
        return True
    if pattern[at : at + 1] != "{":
        return False
    last = pattern[at + 1 : pattern.find("}", at)].rpartition(",")[2]
    return not last.isdecimal() or int(last) > 4
