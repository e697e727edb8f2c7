"""Grammar of the decimal numbers within bounds, as GBNF fragments that refer to no rule.

Numbers are kept to what every reader holds exactly or finitely: 16 digits before the point, few after it, and an
exponent of at most two digits, which numbers with bounds do not have at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal

MAX_DIGITS = 16
LARGEST = Decimal(10) ** MAX_DIGITS - 1

INTEGER = '"-"? ("0" | [1-9] [0-9]{0,15})'
NUMBER = INTEGER + ' ("." [0-9]{1,15})? ([eE] [+\\-]? [0-9]{1,2})?'


@dataclass(frozen=True, slots=True)
class Bound:
    """One end of a range; `open` leaves the value itself out."""

    value: Decimal
    open: bool = False


def integers(low: Bound | None, high: Bound | None) -> list[str]:
    """Alternatives that match exactly the integers within the bounds, up to `MAX_DIGITS` digits."""
    least, most = -int(LARGEST), int(LARGEST)
    if low is not None:
        floor = low.value.to_integral_value(ROUND_FLOOR)
        least = max(least, int(floor) + (floor != low.value or low.open))
    if high is not None:
        floor = high.value.to_integral_value(ROUND_FLOOR)
        most = min(most, int(floor) - (floor == high.value and high.open))
    found = []
    if least <= min(most, -1):
        found += [f'"-" {part}' for part in _naturals(max(1, -most), -least)]
    if most >= 0 and least <= most:
        found += _naturals(max(0, least), most)
    return found


def numbers(low: Bound | None, high: Bound | None) -> list[str]:
    """Alternatives that match only decimal numbers within the bounds."""
    zero = Bound(Decimal(0))
    found = []
    if low is None or low.value < 0:
        nearest = Bound(-high.value, high.open) if high is not None and high.value <= 0 else zero
        farthest = Bound(-low.value, low.open) if low is not None else Bound(LARGEST)
        found += [f'"-" {part}' for part in _positives(nearest, farthest)]
    if high is None or high.value >= 0:
        nearest = low if low is not None and low.value >= 0 else zero
        found += _positives(nearest, high if high is not None else Bound(LARGEST))
    return found


def _naturals(least: int, most: int) -> list[str]:
    """Integers of `least`..`most`, both at least 0, without leading zeros."""
    if least > most:
        return []
    if len(str(most)) - len(str(least)) > 1 and least:
        first, last = 10 ** len(str(least)), 10 ** (len(str(most)) - 1)
        middle = f"[1-9] [0-9]{{{len(str(first)) - 1},{len(str(last)) - 2}}}"
        return [*_same_length(str(least), str(first - 1)), middle, *_same_length(str(last), str(most))]
    if not least:
        return ['"0"', *_naturals(1, most)]
    if len(str(least)) == len(str(most)):
        return _same_length(str(least), str(most))
    border = 10 ** len(str(least))
    return [*_same_length(str(least), str(border - 1)), *_same_length(str(border), str(most))]


def _same_length(least: str, most: str) -> list[str]:
    count = len(least)
    if not count:
        return [""]
    if set(least) == {"0"} and set(most) == {"9"}:
        return [_digits(count, count)]
    if least[0] == most[0]:
        return [f'"{least[0]}" {rest}'.strip() for rest in _same_length(least[1:], most[1:])]
    first, last = int(least[0]), int(most[0])
    found = []
    if set(least[1:]) - {"0"}:
        found += [f'"{first}" {rest}'.strip() for rest in _same_length(least[1:], "9" * (count - 1))]
        first += 1
    top: list[str] = []
    if set(most[1:]) - {"9"}:
        top = [f'"{last}" {rest}'.strip() for rest in _same_length("0" * (count - 1), most[1:])]
        last -= 1
    if first <= last:
        found.append(f"[{first}-{last}] {_digits(count - 1, count - 1)}".strip())
    return found + top


def _digits(least: int, most: int) -> str:
    return "" if most <= 0 else f"[0-9]{{{max(0, least)},{most}}}"


def _positives(low: Bound, high: Bound) -> list[str]:
    """Decimals between two bounds that are at least 0, without a sign."""
    high = min(high, Bound(LARGEST), key=lambda bound: bound.value)
    if low.value > high.value or (low.value == high.value and (low.open or high.open)):
        return []
    first, last = int(low.value), int(high.value)
    low_digits, high_digits = _fraction(low.value), _fraction(high.value)
    if first == last and not low_digits and not low.open:
        return [f'"{last}" {rest}'.strip() for rest in _below(high_digits, high.open, room=14 - len(str(last)))]
    if first == last:
        return [f'"{first}" {rest}' for rest in _between(low, high)]
    fraction = f'("." {_digits(1, 15)})?'
    found = [f'"{first}" {rest}'.strip() for rest in _above(low_digits, low.open, room=14 - len(str(first)))]
    found += [f"({whole}) {fraction}" for whole in _naturals(first + 1, last - 1)]
    return found + [f'"{last}" {rest}'.strip() for rest in _below(high_digits, high.open, room=14 - len(str(last)))]


def _fraction(value: Decimal) -> str:
    digits = format(value, "f").partition(".")[2]
    return digits.rstrip("0")


def _above(bound: str, is_open: bool, room: int) -> list[str]:
    """Fractions, with their point, above a fraction's digits. `room` is how many digits floats tell apart here."""
    spare = max(0, room - len(bound))
    found = []
    for i, digit in enumerate(bound):
        if digit != "9":
            found.append(f'".{bound[:i]}" [{int(digit) + 1}-9] {_digits(0, room - i - 1)}'.strip())
    if not is_open:
        found.append(f'".{bound}" {_digits(0, spare)}'.strip() if bound else f'("." {_digits(1, max(1, room))})?')
    elif spare > 1:
        found.append(f'".{bound}" "0"{{0,{spare // 2 - 1}}} [1-9] {_digits(0, spare // 2)}')
    return found


def _below(bound: str, is_open: bool, room: int) -> list[str]:
    found = []
    for i, digit in enumerate(bound):
        found.append(f'".{bound[:i]}"' if i else "")
        if digit != "0":
            found.append(f'".{bound[:i]}" [0-{int(digit) - 1}] {_digits(0, room - i - 1)}'.strip())
    if not is_open:
        found.append(f'".{bound}" "0"{{0,3}}' if bound else '("." "0"{1,3})?')
    return found


def _between(low: Bound, high: Bound) -> list[str]:
    """Fractions between two bounds with one whole part: as many digits as the finer bound has, and one more."""
    count = max(len(_fraction(low.value)), len(_fraction(high.value))) + 1
    least = int(_fraction(low.value).ljust(count, "0")) + low.open
    most = int(_fraction(high.value).ljust(count, "0")) - high.open
    if least > most:
        return []
    parts = [f'"." {part}' for part in _same_length(str(least).rjust(count, "0"), str(most).rjust(count, "0"))]
    whole = int(low.value) == low.value and not low.open
    return (['""'] if whole else []) + parts
