"""Constraints as GBNF text, and what that text leaves open."""

from __future__ import annotations

import re
from dataclasses import dataclass

from treadle.grammar.constraints import ToolSpec
from treadle.grammar.errors import GrammarTooLargeError, InvalidGrammarError, InvalidSchemaError
from treadle.grammar.lowering import Lowering, Separators
from treadle.grammar.pattern import UntranslatableError, raw_pattern
from treadle.grammar.preflight import SchemaDocument, check_text
from treadle.grammar.rules import literal
from treadle.grammar.tool_text import CLOSE, call_head

COMPACT = Separators(",", ":")
# How the models that make tool calls were shown them: Python's own spacing.
SPACED = Separators(", ", ": ")

MAX_OPTIONS = 2_000
MAX_REPETITION = 10_000

_REPETITION = re.compile(r"\S\s*\{\s*(\d*)\s*,?\s*(\d*)\s*\}")


@dataclass(frozen=True, slots=True)
class Source:
    """GBNF whose start rule is `root`, and the JSON pointers of the keywords that it does not guarantee."""

    text: str
    unenforced: tuple[str, ...] = ()


def schema_source(schema: str, strict: bool) -> Source:
    """Compact JSON that satisfies a schema. Raises `GrammarError`."""
    document = SchemaDocument(schema)
    lowering = Lowering(document, COMPACT, strict=strict)
    return Source(lowering.grammar(), lowering.unenforced)


def call_source(tool: ToolSpec, *, closing: bool) -> Source:
    """What follows the opening tag of a call of one tool; with `closing`, the closing tag too.

    Raises `GrammarError`.
    """
    document = SchemaDocument(tool.parameters)
    lowering = Lowering(document, SPACED, strict=False, root_type="object")
    head, tail = literal(call_head(tool.name)), literal("}\n" + CLOSE if closing else "}\n")
    try:
        grammar = lowering.grammar(before=head, after=tail)
    except InvalidSchemaError as error:
        raise InvalidSchemaError(error.pointer, f"{error} (the parameters of the tool {tool.name!r})") from error
    return Source(grammar, lowering.unenforced)


def choice_source(options: tuple[str, ...]) -> Source:
    """Raises `InvalidGrammarError` for no options, `GrammarTooLargeError` for too many."""
    if not options:
        raise InvalidGrammarError("a choice needs at least one option.")
    if len(options) > MAX_OPTIONS:
        raise GrammarTooLargeError("options of a choice", len(options), MAX_OPTIONS)
    check_text("".join(options), "the options together")
    return Source("root ::= " + " | ".join(literal(option) for option in dict.fromkeys(options)) + "\n")


def regex_source(pattern: str) -> Source:
    """Raises `InvalidGrammarError` for what is no regular expression or cannot be followed."""
    try:
        return Source(f"root ::= {raw_pattern(pattern)}\n")
    except UntranslatableError as error:
        raise InvalidGrammarError(f"the pattern {pattern[:80]!r} cannot be followed: {error}") from error


def ebnf_source(grammar: str) -> Source:
    """Raises `GrammarTooLargeError` for large repetitions. What is no grammar shows when it is compiled.

    Repetitions of groups and rules may be nested in each other, so they are multiplied.
    """
    nested = largest = 1
    for found in _REPETITION.finditer(grammar):
        count = max(int(number[:9] or 1) for number in found.groups())
        if found[0][0] in '"]':
            largest = max(largest, count)
        else:
            nested *= count
        if nested * largest > MAX_REPETITION:
            raise GrammarTooLargeError("repetitions in the grammar, multiplied out", nested * largest, MAX_REPETITION)
    return Source(grammar)
