"""Constrained generation: what a caller may ask of a model's text, and which tokens keep to it.

Everything that a process without a model needs is here. `treadle.grammar.compiler` imports torch.
"""

from treadle.grammar.constraints import (
    EBNF,
    Choice,
    Constraint,
    JSONSchema,
    Regex,
    ToolSpec,
    ToolTurn,
    constraint_from_json,
    constraint_to_json,
)
from treadle.grammar.errors import (
    GrammarError,
    GrammarTimeoutError,
    GrammarTooLargeError,
    InvalidGrammarError,
    InvalidSchemaError,
    UnsupportedSchemaError,
)
from treadle.grammar.tool_text import ToolCall, TurnDelta, TurnStream, render_tool_calls

__all__ = [
    "EBNF",
    "Choice",
    "Constraint",
    "GrammarError",
    "GrammarTimeoutError",
    "GrammarTooLargeError",
    "InvalidGrammarError",
    "InvalidSchemaError",
    "JSONSchema",
    "Regex",
    "ToolCall",
    "ToolSpec",
    "ToolTurn",
    "TurnDelta",
    "TurnStream",
    "UnsupportedSchemaError",
    "constraint_from_json",
    "constraint_to_json",
    "render_tool_calls",
]
