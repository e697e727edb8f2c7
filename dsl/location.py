"""Where in the user's code something was written."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import NamedTuple

_HERE = os.path.dirname(__file__) + os.sep


class Location(NamedTuple):
    """A line of the user's code; `str` gives `file:line`."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def caller_frame() -> FrameType:
    """The innermost frame that is not of this package."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_HERE) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def caller() -> Location:
    """The user's line that is running."""
    frame = caller_frame()
    return Location(frame.f_code.co_filename, frame.f_lineno)
