"""Why a constraint was refused. Each message says what happened and what to do about it."""

from __future__ import annotations


class GrammarError(ValueError):
    """Base of every refusal of a constraint. Only the request that carried it is affected."""


class InvalidGrammarError(GrammarError):
    """A constraint that means nothing: malformed wire text, a regex or grammar that does not parse, no choices."""


class InvalidSchemaError(GrammarError):
    """A JSON Schema that its meta-schema refuses, or that no JSON value satisfies. `pointer` is a JSON pointer."""

    def __init__(self, pointer: str, reason: str) -> None:
        self.pointer = pointer
        super().__init__(f"the schema is wrong at {pointer or 'its root'}: {reason}")


class UnsupportedSchemaError(GrammarError):
    """A keyword that cannot be guaranteed while generating. `pointer` is where `keyword` stands."""

    def __init__(self, keyword: str, pointer: str, advice: str) -> None:
        self.keyword = keyword
        self.pointer = pointer
        super().__init__(f"{keyword!r} at {pointer or 'the root'} cannot be enforced while generating. {advice}")


class GrammarTooLargeError(GrammarError):
    """A constraint past one of the bounds that keep hostile input from exploding."""

    def __init__(self, what: str, size: int, limit: int) -> None:
        super().__init__(f"{what}: {size:,}, and at most {limit:,} is allowed. Simplify the constraint or split it.")


class GrammarTimeoutError(GrammarError):
    """Compiling took longer than the caller would wait. The work goes on, so that a later attempt may find it done."""

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"the constraint did not compile within {seconds:g} s. Try again later, or simplify it: long strings with "
            "maxLength and patterns with large repetitions cost the most."
        )
