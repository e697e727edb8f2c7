"""Grammar of JSON's numbers and strings within a schema's bounds, and of any JSON value at all."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from treadle.grammar.errors import GrammarTooLargeError
from treadle.grammar.numbers import INTEGER, LARGEST, NUMBER, Bound, integers, numbers
from treadle.grammar.pattern import JSONPattern, UntranslatableError, json_pattern
from treadle.grammar.rules import Alternative, Rules, literal

if TYPE_CHECKING:
    from treadle.grammar.lowering import Lowering

# A string's text up to its closing quote. A \u escape is a whole character: surrogates come in pairs.
_PLAIN = r"[^\0-\x1f\"\\\ud800-\udfff]"
_ESCAPE = (
    r'(["\\/bfnrt] | "u" ([0-9A-CE-Fa-ce-f] [0-9A-Fa-f] [0-9A-Fa-f] [0-9A-Fa-f] | [Dd] [0-7] [0-9A-Fa-f] [0-9A-Fa-f]'
    r' | [Dd] [89ABab] [0-9A-Fa-f] [0-9A-Fa-f] "\\u" [Dd] [C-Fc-f] [0-9A-Fa-f] [0-9A-Fa-f]))'
)
# Tells the mask builder what follows a string, so that tokens past its end are settled when compiling.
FOLLOWED = "(=[,}\\]:])"

_DAY = r"(((0[13578]|1[02])-(0[1-9]|[12]\d|3[01]))|((0[469]|11)-(0[1-9]|[12]\d|30))|(02-(0[1-9]|1\d|2[0-8])))"
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+\-]([01]\d|2[0-3]):[0-5]\d)"
_OCTET = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
FORMATS = {
    "date": rf"^[1-9]\d{{3}}-{_DAY}$",
    "time": rf"^{_TIME}$",
    "date-time": rf"^[1-9]\d{{3}}-{_DAY}T{_TIME}$",
    "uuid": r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
    "ipv4": rf"^{_OCTET}\.{_OCTET}\.{_OCTET}\.{_OCTET}$",
}


def define_any(rules: Rules, item: str, key: str) -> None:
    """Defines `value`, `object`, `array`, `string`, `number` and what they are made of."""
    item, key = literal(item), literal(key)
    member = f"string {key} value"
    rules.define("escape", [Alternative(_ESCAPE)])
    rest = [Alternative('"\\""'), Alternative(f"{_PLAIN} chars"), Alternative('"\\\\" escape chars', ("escape",))]
    rules.define("chars", rest)
    rules.define("string", [Alternative(f'"\\"" chars {FOLLOWED}', ("chars",))])
    rules.define("number", [Alternative(NUMBER)])
    rules.define("integer", [Alternative(INTEGER)])
    kinds = ["string", "number", "object", "array"]
    words = [Alternative(f'"{word}"') for word in ("true", "false", "null")]
    rules.define("value", [*(Alternative(kind, (kind,)) for kind in kinds), *words])
    rules.define(
        "object",
        [Alternative('"{}"'), Alternative(f'"{{" {member} members "}}"', ("string", "value", "members"))],
    )
    rules.define("members", [Alternative('""'), Alternative(f"{item} {member} members", ("string", "value"))])
    rules.define("array", [Alternative('"[]"'), Alternative('"[" value elements "]"', ("value", "elements"))])
    rules.define("elements", [Alternative('""'), Alternative(f"{item} value elements", ("value",))])


def number_alternatives(
    lowering: Lowering, conjunction: dict[str, dict[str, Any]], *, whole: bool
) -> list[Alternative]:
    """Numbers, or with `whole` integers, within the bounds of all schemas."""
    lows: list[Bound] = []
    highs: list[Bound] = []
    for pointer, schema in conjunction.items():
        step = schema.get("multipleOf")
        if step is not None:
            if step == 1:
                whole = True
            elif not (whole and isinstance(step, float) and (1 / step).is_integer()):
                lowering.skip(pointer, "multipleOf")
        for keyword, bounds in (("Minimum", lows), ("Maximum", highs)):
            plain, exclusive = schema.get(keyword.lower()), schema.get(f"exclusive{keyword}")
            if isinstance(plain, (int, float)) and not isinstance(plain, bool):
                bounds.append(Bound(_decimal(plain), exclusive is True))
            if isinstance(exclusive, (int, float)) and not isinstance(exclusive, bool):
                bounds.append(Bound(_decimal(exclusive), True))
    low = max(lows, key=lambda bound: (bound.value, bound.open), default=None)
    high = min(highs, key=lambda bound: (bound.value, not bound.open), default=None)
    if low is not None and low.value < -LARGEST:
        low = None
    if high is not None and high.value > LARGEST:
        high = None
    if low is None and high is None:
        name = "integer" if whole else "number"
        return [Alternative(name, (name,))]
    return [Alternative(text) for text in (integers(low, high) if whole else numbers(low, high))]


def string_alternatives(lowering: Lowering, name: str, conjunction: dict[str, dict[str, Any]]) -> list[Alternative]:
    """Strings of all schemas' lengths, pattern and format. One pattern or format is enforced, or the lengths."""
    least = max((_size(schema.get("minLength", 0)) for schema in conjunction.values()), default=0)
    mosts = [_size(schema["maxLength"]) for schema in conjunction.values() if "maxLength" in schema]
    most = min(mosts, default=None)
    if most is not None and most < least:
        return []
    chosen = _choose_pattern(lowering, conjunction)
    if chosen is not None:
        fits = chosen.least >= least and (most is None or (chosen.most is not None and chosen.most <= most))
        if not fits:
            _skip_lengths(lowering, conjunction)
        return [
            Alternative(f'"\\"" {text} chars', ("chars",)) if more else Alternative(f'"\\"" {text} "\\""')
            for text, more in chosen.alternatives
        ]
    if not least and most is None:
        return [Alternative("string", ("string",))]
    num_states = least if most is None else most
    if num_states > lowering.string_states:
        _skip_lengths(lowering, conjunction)
        return [Alternative("string", ("string",))]
    lowering.string_states -= num_states
    first = _length_rules(lowering.rules, least, most)
    bounded = lowering.fresh(name, "text")
    lowering.rules.define(bounded, [Alternative(f'"\\"" {first} {FOLLOWED}', (first,))])
    return [Alternative(bounded, (bounded,))]


def _choose_pattern(lowering: Lowering, conjunction: dict[str, dict[str, Any]]) -> JSONPattern | None:
    """The first pattern or format that a grammar can carry. The others are noted as not enforced."""
    chosen: JSONPattern | None = None
    for pointer, schema in conjunction.items():
        for keyword in ("pattern", "format"):
            if keyword not in schema:
                continue
            pattern = schema["pattern"] if keyword == "pattern" else FORMATS.get(schema["format"])
            try:
                if pattern is None or chosen is not None:
                    raise UntranslatableError("")
                chosen = json_pattern(pattern, lossy=lowering.strict)
            except (UntranslatableError, GrammarTooLargeError):
                lowering.skip(pointer, keyword)
    return chosen


def _skip_lengths(lowering: Lowering, conjunction: dict[str, dict[str, Any]]) -> None:
    for pointer, schema in conjunction.items():
        for keyword in ("minLength", "maxLength"):
            if schema.get(keyword):
                lowering.skip(pointer, keyword)


def _length_rules(rules: Rules, least: int, most: int | None) -> str:
    """The rule for `least` to `most` more characters and the closing quote. One rule a character: masks stay fast."""
    name = f"chars-{least}-{'' if most is None else most}"
    start = name
    while name not in rules.alternatives:
        close = [] if least else [Alternative('"\\""')]
        if most == 0:
            rules.define(name, close)
            break
        least, most = max(0, least - 1), None if most is None else most - 1
        following = "chars" if not least and most is None else f"chars-{least}-{'' if most is None else most}"
        more = [
            Alternative(f"{_PLAIN} {following}", (following,)),
            Alternative(f'"\\\\" escape {following}', ("escape", following)),
        ]
        rules.define(name, close + more)
        name = following
    return start


def _decimal(number: float) -> Decimal:
    return Decimal(repr(number)) if isinstance(number, float) else Decimal(number)


def _size(number: float) -> int:
    """Sizes may be written as 2.0."""
    return int(number)
