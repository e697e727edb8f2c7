"""What one rendering of a chat template may cost, and how it pays."""

from __future__ import annotations

import threading
import time

from jinja2.utils import Namespace

MAX_CHARS = 4_000_000
"""The longest prompt, and the longest value that a template may make on the way to it."""
MAX_SECONDS = 5.0

_WORK_PER_CHAR = 16
_WORK_PER_STEP = 64


class OutOfBounds(Exception):
    """A template has used up what one rendering may cost."""


class Budget(threading.local):
    """What the rendering in this thread may still cost: characters of work, and time."""

    work = 0
    deadline = 0.0

    def start(self) -> None:
        self.work = MAX_CHARS * _WORK_PER_CHAR
        self.deadline = time.monotonic() + MAX_SECONDS

    def pay(self, amount: int) -> None:
        self.work -= amount + _WORK_PER_STEP
        if self.work < 0:
            raise OutOfBounds("does too much work")
        if time.monotonic() > self.deadline:
            raise OutOfBounds(f"runs for more than {MAX_SECONDS:g} seconds")

    def pay_to_make(self, size: int) -> None:
        """Pays for a value of `size` characters or elements before it is made."""
        if size > MAX_CHARS:
            raise OutOfBounds(f"makes a text of more than {MAX_CHARS} characters")
        self.pay(max(size, 0))

    def pay_for(self, value: object) -> None:
        """Pays for a value that has been made. A container is paid for with all that is in it, as often as it is in
        it: otherwise lists of twice the same list would double for free."""
        if isinstance(value, str):
            self.pay(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.pay(self.weigh(value)[0])
        else:
            self.pay(0)

    def weigh(self, value: object) -> tuple[int, int, int]:
        """The elements in `value`, the characters in its text, and how deep it nests."""
        elements = chars = depth = 0
        stack: list[tuple[object, int]] = [(value, 1)]
        while stack:
            item, level = stack.pop()
            elements += 1
            depth = max(depth, level)
            if isinstance(item, str):
                chars += len(item)
            elif isinstance(item, (list, tuple)):
                self.pay(len(item))
                stack += [(child, level + 1) for child in item]
            elif isinstance(item, dict):
                self.pay(2 * len(item))
                stack += [(child, level + 1) for pair in item.items() for child in pair]
            elif isinstance(item, Namespace):
                raise OutOfBounds("writes a namespace as text")
        return elements, chars + 8 * elements, depth
