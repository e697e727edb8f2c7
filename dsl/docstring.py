"""What a docstring says of a function and of its parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

_GOOGLE = re.compile(r"(?:Args|Arguments|Parameters):\s*")
_GOOGLE_ITEM = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")
_NUMPY_ITEM = re.compile(r"\*{0,2}(\w+(?:\s*,\s*\w+)*)\s*(?::.*)?")
_SPHINX_ITEM = re.compile(r":param\s+(?:[^:]*\s)?(\w+)\s*:\s*(.*)")


def summary(docstring: str | None) -> str:
    """The first paragraph, in one line."""
    first = inspect.cleandoc(docstring or "").split("\n\n")[0].splitlines()
    return " ".join(line.strip() for line in first if not _SPHINX_ITEM.match(line.strip()))


def parameter_summaries(docstring: str | None) -> dict[str, str]:
    """What is said of each parameter, in one line each, in the style of Google, NumPy or Sphinx."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    for index, line in enumerate(lines):
        if _GOOGLE.fullmatch(line):
            return _google(lines[index + 1 :])
        if line.strip() == "Parameters" and index + 1 < len(lines) and set(lines[index + 1].strip()) == {"-"}:
            return _numpy(lines[index + 2 :])
    return _sphinx(lines)


def _google(lines: Iterable[str]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    margin, current = None, None
    for line in lines:
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        if indent == 0:
            break
        margin = indent if margin is None else margin
        item = _GOOGLE_ITEM.fullmatch(line.strip()) if indent == margin else None
        if item:
            current = found.setdefault(item[1], [])
            current.append(item[2])
        elif current is not None:
            current.append(line.strip())
    return _joined(found)


def _numpy(lines: list[str]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    current: list[list[str]] = []
    for index, line in enumerate(lines):
        following = lines[index + 1].strip() if index + 1 < len(lines) else ""
        if line and not line[0].isspace():
            if following and set(following) == {"-"}:
                break
            item = _NUMPY_ITEM.fullmatch(line)
            current = [found.setdefault(name.strip(), []) for name in item[1].split(",")] if item else []
        else:
            for texts in current:
                texts.append(line.strip())
    return _joined(found)


def _sphinx(lines: Iterable[str]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in lines:
        item = _SPHINX_ITEM.match(line.strip())
        if item:
            current = found.setdefault(item[1], [])
            current.append(item[2])
        elif line[:1].isspace() and current is not None:
            current.append(line.strip())
        else:
            current = None
    return _joined(found)


def _joined(found: dict[str, list[str]]) -> dict[str, str]:
    texts = {name: " ".join(part for part in parts if part) for name, parts in found.items()}
    return {name: text for name, text in texts.items() if text}
