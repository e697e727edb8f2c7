"""Regular expressions as GBNF fragments, for the part of their syntax that means the same everywhere.

The classes `\\d`, `\\w` and `\\s` are taken as ASCII, and `.` without any line break, so that what is matched here is
matched by every dialect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from treadle.grammar.errors import GrammarError, GrammarTooLargeError

MAX_LENGTH = 4_096
MAX_STATES = 4_096
MAX_DEPTH = 32

Ranges = tuple[tuple[int, int], ...]

_LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
_DIGIT: Ranges = ((48, 57),)
_WORD: Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
_SPACE: Ranges = ((9, 13), (32, 32))
_ASCII_ONLY_COMPLEMENT = {"D": _DIGIT, "W": _WORD, "S": _SPACE}
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11}
_LINE_BREAKS: Ranges = ((10, 10), (13, 13), (0x85, 0x85), (0x2028, 0x2029))
_NEEDS_ESCAPE: Ranges = ((0, 31), (34, 34), (92, 92))
_SHORT_ESCAPES = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\"}


class UntranslatableError(GrammarError):
    """A construct whose meaning a grammar cannot carry. The text names it."""


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of ranges of code points."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Repeat:
    """`least` to `most` times what `node` matches; None is without end."""

    node: Node
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Sequence:
    """One after the other."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Either:
    """One of the branches."""

    nodes: tuple[Node, ...]


Node = Chars | Repeat | Sequence | Either
_CharsWriter = Callable[[Ranges], str]


@dataclass(frozen=True, slots=True)
class Branch:
    """A top-level alternative, and whether `^` and `$` bound it."""

    node: Node
    from_start: bool
    to_end: bool


def raw_pattern(pattern: str) -> str:
    """A fragment for the texts that `pattern` matches as a whole.

    Raises `UntranslatableError`, and `GrammarTooLargeError` for large repetitions.
    """
    branches = parse(pattern)
    return " | ".join(_fragment(branch.node, _raw_chars) for branch in branches)


@dataclass(frozen=True, slots=True)
class JSONPattern:
    """Fragments for the inside of a JSON string, from the first quote to the last, and the lengths they allow.

    Where `open_ended`, the fragment must be followed by the rest of a string and its quote.
    """

    alternatives: tuple[tuple[str, bool], ...]
    least: int
    most: int | None


def json_pattern(pattern: str, *, lossy: bool) -> JSONPattern:
    """Fragments for JSON strings in which `pattern` is found. Each is paired with whether more may follow.

    With `lossy`, characters that JSON escapes are left out of classes; without, such classes are refused, for a string
    that cannot contain a quote or line break is not what a `.` asks for. Raises as `raw_pattern` does.
    """
    branches = parse(pattern)
    if not all(branch.from_start for branch in branches):
        raise UntranslatableError("it may begin anywhere, as it does not start with ^")
    chars = _lossy_json_chars if lossy else _json_chars
    alternatives = tuple((_fragment(branch.node, chars), not branch.to_end) for branch in branches)
    lengths = [length_of(branch.node) for branch in branches]
    mosts = [most for _, most in lengths]
    bounded = all(branch.to_end for branch in branches) and None not in mosts
    most = max(most for most in mosts if most is not None) if bounded else None
    return JSONPattern(alternatives, min(least for least, _ in lengths), most)


def parse(pattern: str) -> list[Branch]:
    """The top-level alternatives of a pattern. Raises as `raw_pattern` does."""
    if len(pattern) > MAX_LENGTH:
        raise GrammarTooLargeError("characters of a pattern", len(pattern), MAX_LENGTH)
    branches = _Parser(pattern).branches()
    states = sum(_num_states(branch.node) for branch in branches)
    if states > MAX_STATES:
        raise GrammarTooLargeError("repetitions of a pattern, multiplied out", states, MAX_STATES)
    return branches


def length_of(node: Node) -> tuple[int, int | None]:
    """The fewest and the most characters that a node matches."""
    if isinstance(node, Chars):
        return 1, 1
    if isinstance(node, Repeat):
        least, most = length_of(node.node)
        return least * node.least, None if node.most is None or most is None else most * node.most
    lengths = [length_of(child) for child in node.nodes]
    mosts = [most for _, most in lengths if most is not None]
    known = len(mosts) == len(lengths)
    if isinstance(node, Either):
        return min(least for least, _ in lengths), max(mosts) if known else None
    return sum(least for least, _ in lengths), sum(mosts) if known else None


def _num_states(node: Node) -> int:
    if isinstance(node, Chars):
        return 1
    if isinstance(node, Repeat):
        return _num_states(node.node) * max(1, node.least, node.most or 0)
    return sum(_num_states(child) for child in node.nodes)


class _Parser:
    """Recursive descent over one pattern."""

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self._depth = 0

    def branches(self) -> list[Branch]:
        found = []
        while True:
            from_start = self._take("^")
            node = self._sequence(top=True)
            found.append(Branch(node, from_start, self._take("$")))
            if not self._take("|"):
                break
        if self._at < len(self._text):
            raise UntranslatableError(f"{self._peek()!r} at {self._at} is out of place")
        return found

    def _sequence(self, *, top: bool = False) -> Node:
        nodes: list[Node] = []
        while (char := self._peek()) and char not in "|)":
            if char in "^$":
                if top and char == "$" and self._text[self._at + 1 : self._at + 2] in ("", "|"):
                    break
                raise UntranslatableError(f"the anchor {char!r} at {self._at} is within the pattern")
            nodes.append(self._quantified())
        return Sequence(tuple(nodes))

    def _quantified(self) -> Node:
        node = self._atom()
        while (char := self._peek()) and char in "*+?{":
            if isinstance(node, Repeat):
                raise UntranslatableError(f"a quantifier on a quantifier at {self._at}")
            least, most = self._quantifier()
            node = Repeat(node, least, most)
            self._take("?")
        return node

    def _quantifier(self) -> tuple[int, int | None]:
        char = self._next()
        if char != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        body, closed, _ = self._text[self._at : self._at + 24].partition("}")
        first, comma, last = body.partition(",")
        if not closed or not first.isdecimal() or (last and not last.isdecimal()):
            raise UntranslatableError(f"the quantifier at {self._at} is malformed")
        self._at += len(body) + 1
        least, most = int(first), (int(last) if last else None) if comma else int(first)
        if most is not None and most < least:
            raise UntranslatableError(f"the quantifier at {self._at} has its bounds the wrong way round")
        if max(least, most or 0) > MAX_STATES:
            raise GrammarTooLargeError("repetitions of a pattern", max(least, most or 0), MAX_STATES)
        return least, most

    def _atom(self) -> Node:
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return Chars(self._class())
        if char == ".":
            return Chars(_complement(_LINE_BREAKS))
        if char == "\\":
            return Chars(self._escape())
        if char in "*+?{":
            raise UntranslatableError(f"{char!r} at {self._at - 1} repeats nothing")
        return Chars(((ord(char), ord(char)),))

    def _group(self) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise GrammarTooLargeError("nested groups of a pattern", self._depth, MAX_DEPTH)
        if self._take("?") and not self._take(":"):
            raise UntranslatableError(f"the group at {self._at} is neither plain nor (?:...)")
        nodes = [self._sequence()]
        while self._take("|"):
            nodes.append(self._sequence())
        if not self._take(")"):
            raise UntranslatableError("a group is not closed")
        self._depth -= 1
        return nodes[0] if len(nodes) == 1 else Either(tuple(nodes))

    def _class(self) -> Ranges:
        negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        while not self._take("]"):
            low = self._class_item()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._next()
                high = self._class_item()
                if len(low) != 1 or len(high) != 1 or low[0][0] != low[0][1] or low[0][0] > high[0][1]:
                    raise UntranslatableError(f"the range before {self._at} is malformed")
                low = ((low[0][0], high[0][1]),)
            ranges += low
        if not ranges:
            raise UntranslatableError(f"the class before {self._at} is empty")
        return _complement(tuple(ranges)) if negated else _normal(tuple(ranges))

    def _class_item(self) -> Ranges:
        char = self._next()
        if char == "[" and self._peek() in (":", "=", "."):
            raise UntranslatableError("POSIX classes are not known here")
        return self._escape() if char == "\\" else ((ord(char), ord(char)),)

    def _escape(self) -> Ranges:
        char = self._next()
        if char in _CLASSES:
            return _CLASSES[char]
        if char in _ASCII_ONLY_COMPLEMENT:
            # Other dialects count letters and digits beyond ASCII, so the complement is kept within ASCII.
            return tuple((low, min(high, 127)) for low, high in _complement(_ASCII_ONLY_COMPLEMENT[char]) if low < 128)
        if char in _CONTROLS:
            return ((_CONTROLS[char], _CONTROLS[char]),)
        if char in ("x", "u"):
            digits = self._text[self._at : self._at + (2 if char == "x" else 4)]
            self._at += len(digits)
            try:
                code = int(digits, 16)
            except ValueError:
                raise UntranslatableError(f"the escape before {self._at} is malformed") from None
            return ((code, code),)
        if char.isalnum():
            raise UntranslatableError(f"\\{char} at {self._at - 2} is not known here")
        return ((ord(char), ord(char)),)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        char = self._peek()
        if not char:
            raise UntranslatableError("it ends too early")
        self._at += 1
        return char

    def _take(self, char: str) -> bool:
        if self._peek() != char:
            return False
        self._at += 1
        return True


def _normal(ranges: Ranges) -> Ranges:
    """Sorted, merged, and without surrogates."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    first, last = _SURROGATES
    pieces = [part for low, high in merged for part in ((low, min(high, first - 1)), (max(low, last + 1), high))]
    return tuple((low, high) for low, high in pieces if low <= high)


def _complement(ranges: Ranges) -> Ranges:
    found, at = [], 0
    for low, high in _normal(ranges):
        found.append((at, low - 1))
        at = high + 1
    return _normal(tuple((low, high) for low, high in [*found, (at, _LAST)] if low <= high))


def _fragment(node: Node, chars: _CharsWriter) -> str:
    if isinstance(node, Chars):
        return chars(node.ranges)
    if isinstance(node, Repeat):
        if node.most == 0:
            return '""'
        most = "" if node.most is None else str(node.most)
        return f"({_fragment(node.node, chars)}){{{node.least},{most or -1}}}"
    if isinstance(node, Either):
        return "(" + " | ".join(_fragment(child, chars) for child in node.nodes) + ")"
    return " ".join(_fragment(child, chars) for child in node.nodes) or '""'


def _raw_chars(ranges: Ranges) -> str:
    if not ranges:
        raise UntranslatableError("a class matches no character")
    return "[" + "".join(_code(low) if low == high else f"{_code(low)}-{_code(high)}" for low, high in ranges) + "]"


def _code(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_chars(ranges: Ranges) -> str:
    plain = _normal(tuple(part for low, high in ranges for part in _without_escapes(low, high)))
    if plain == _normal(ranges):
        return _raw_chars(ranges)
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        code = ranges[0][0]
        escape = _SHORT_ESCAPES.get(code) or f"u{code:04x}"
        return '"\\\\' + ('\\"' if escape == '"' else "\\\\" if escape == "\\" else escape) + '"'
    raise UntranslatableError("one of its classes has characters that JSON escapes")


def _lossy_json_chars(ranges: Ranges) -> str:
    plain = _normal(tuple(part for low, high in ranges for part in _without_escapes(low, high)))
    return _raw_chars(plain) if plain else _json_chars(ranges)


def _without_escapes(low: int, high: int) -> list[tuple[int, int]]:
    parts = [(low, high)]
    for first, last in _NEEDS_ESCAPE:
        parts = [
            part for a, b in parts for part in ((a, min(b, first - 1)), (max(a, last + 1), b)) if part[0] <= part[1]
        ]
    return parts
