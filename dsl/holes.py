"""Holes: how a variable formatted into a prompt is found again in the finished text.

Inside the body of an `@llm` function a variable formats as a tag, which holds the nonce of its program and the id of
its node::

    f"Review: {draft}"  ->  "Review: \\ue000<nonce>:n3\\ue001"  ->  ["Review: ", draft]

Nobody outside the process ever sees a nonce, so text that looks like a tag but was not made here stays text.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from treadle.dsl.errors import PromptError, VarUseError
from treadle.dsl.location import caller

if TYPE_CHECKING:
    from treadle.dsl.program import Program
    from treadle.dsl.var import Var

    Segment: TypeAlias = str | Var[Any]

_OPEN, _CLOSE = "\ue000", "\ue001"
_TAG = re.compile(f"{_OPEN}([0-9a-f]{{32}}):(n[0-9]+){_CLOSE}")
_TELLTALE = 12

RENDERING: ContextVar[Rendering | None] = ContextVar("treadle_rendering", default=None)


@dataclass(frozen=True, slots=True)
class Rendering:
    """A body that is running.

    Attributes:
        program: Of its call.
        visible: By nonce, the programs whose variables may be holes in it.
    """

    program: Program
    visible: dict[str, Program]

    def split(self, text: str) -> tuple[Segment, ...]:
        """Cuts a text at its holes. Empty pieces are left out.

        Raises `PromptError` if a hole was damaged: cut, or changed to upper case.
        """
        segments: list[Segment] = []
        start = 0
        for match in _TAG.finditer(text):
            program = self.visible.get(match[1])
            node = program.find(match[2]) if program else None
            if node is not None:
                self._add_text(segments, text[start : match.start()])
                segments.append(node.output)
                start = match.end()
        self._add_text(segments, text[start:])
        return tuple(segments)

    def _add_text(self, segments: list[Segment], text: str) -> None:
        folded = text.lower()
        for nonce in self.visible:
            if nonce[:_TELLTALE] in folded or nonce[-_TELLTALE:] in folded:
                raise PromptError(
                    f"{caller()}: a variable in this prompt was sliced or changed as text. "
                    "Its text is not known yet: `await` it first, or format it unchanged"
                )
        if text:
            segments.append(text)


def refuse_holes(text: object) -> None:
    """Raises `VarUseError` if a variable was formatted into a text that is not for a prompt."""
    rendering = RENDERING.get()
    if (
        rendering is not None
        and isinstance(text, str)
        and any(not isinstance(part, str) for part in rendering.split(text))
    ):
        raise VarUseError(
            f"{caller()}: a variable was formatted into an argument of a tool: await it first, or pass it as it is"
        )


def rendering_of(program: Program) -> Rendering:
    """What the body of a call of `program` runs under."""
    return Rendering(program, {each.nonce: each for each in (program, *program.ancestors)})


def tag(var: Var[Any], spec: str = "") -> str | None:
    """The hole of a variable, or None outside of a body."""
    rendering = RENDERING.get()
    if rendering is None:
        return None
    if spec:
        raise VarUseError(
            f"{caller()}: a format such as {spec!r} needs the value of {var.node.name}: await the variable first"
        )
    rendering.program.check_input(var)
    rendering.visible[var.program.nonce] = var.program
    return f"{_OPEN}{var.program.nonce}:{var.node.id}{_CLOSE}"
