"""Trace files: opened whatever compresses them, read line by line within a limit, with errors that name the line."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

MAX_LINE_BYTES = 16 * 2**20
MAX_FILE_BYTES = 2**30


class TraceError(ValueError):
    """A trace that cannot be read; the text names the file, and the line where there is one."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file, without its end."""

    where: str
    text: str


def lines(path: Path) -> Iterator[Line]:
    """The lines of a text file, plain, gzip or xz, empty ones left out.

    Raises:
        TraceError: the file is not there, is not text, is damaged, or has more in it than the limits of this module.
    """
    number = total = 0
    try:
        with _open(path) as file:
            while content := file.readline(MAX_LINE_BYTES + 1):
                number, total = number + 1, total + len(content)
                if len(content) > MAX_LINE_BYTES:
                    raise TraceError(f"{path}:{number}: a line of more than {MAX_LINE_BYTES} bytes")
                if total > MAX_FILE_BYTES:
                    raise TraceError(f"{path}:{number}: more than {MAX_FILE_BYTES} bytes")
                line = Line(f"{path}:{number}", _text(content, f"{path}:{number}"))
                if line.text:
                    yield line
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise TraceError(f"{path}: damaged after line {number}: {error}") from error
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}") from error


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode().strip()
    except UnicodeDecodeError as error:
        raise TraceError(f"{where}: not text: {error}") from None


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.open(path))
    if magic == b"\xfd7zXZ\x00":
        return cast(BinaryIO, lzma.open(path))
    return path.open("rb")


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON object of a trace; its getters check the types, and their errors say where it stood."""

    where: str
    data: dict[str, Any]

    @classmethod
    def parse(cls, line: Line) -> Record:
        """The object of a line of JSON."""
        return cls.of(line.where, decode(line))

    @classmethod
    def json(cls, where: str, text: str) -> Record:
        """The object of a whole JSON text."""
        return cls.parse(Line(where, text))

    @classmethod
    def of(cls, where: str, value: object) -> Record:
        if not isinstance(value, dict):
            raise TraceError(f"{where}: expected a JSON object")
        return cls(where, value)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number of at least 0; `default` if the field is missing or null."""
        value = self.data.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise self.error(name, "a number of at least 0")
        return value

    def integer(self, name: str) -> int:
        """A whole number of at least 0."""
        value = self.data.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(name, "a whole number of at least 0")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string; `default` if the field is missing or null."""
        value = self.data.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(name, "a text")
        return value

    def items(self, name: str, *, optional: bool = False) -> list[Any]:
        """A list; an empty one if the field is missing or null and may be."""
        value = self.data.get(name)
        if value is None and optional:
            return []
        if not isinstance(value, list):
            raise self.error(name, "a list")
        return value

    def records(self, name: str, *, optional: bool = False) -> list[Record]:
        """A list of objects."""
        return [Record.of(f"{self.where}: {name}", item) for item in self.items(name, optional=optional)]

    def integers(self, name: str) -> list[int]:
        """A list of whole numbers."""
        value = self.items(name)
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value):
            raise self.error(name, "a list of whole numbers of at least 0")
        return value

    def runs(self, name: str) -> list[tuple[int, int]]:
        """A list of pairs of whole numbers, which are `[start, count]` of blocks."""
        value = self.items(name)
        if not all(
            isinstance(run, list) and len(run) == 2 and all(isinstance(part, int) for part in run) for run in value
        ):
            raise self.error(name, "a list of [start, count]")
        return [(start, count) for start, count in value]

    def error(self, name: str, expected: str) -> TraceError:
        return TraceError(f"{self.where}: {name} must be {expected}, not {str(self.data.get(name))[:40]!r}")


def decode(line: Line) -> Any:
    """The JSON value of a line."""
    try:
        return json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{line.where}: not JSON: {error}") from None
