"""What a scheduler has learned, kept in a file from one engine to the next."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import warnings
from pathlib import Path

from treadle.runtime.errors import InvalidRequestError
from treadle.scheduler.policies import Books
from treadle.scheduler.spread import Spreads

FIELDS = ("pauses", "outputs", "durations")
"""Those of the books that are kept."""


class LearnedFile:
    """What a scheduler's books have learned: filled in from a file at once, and put back by `save`.

    Two engines may share a file: the last to close wins, and what the other has learned meanwhile is lost.

    Raises `InvalidRequestError` for a file that is damaged or cannot be read, and for a folder that cannot be written
    to. Without a file there the books stay as they are.
    """

    def __init__(self, path: str | Path, books: Books) -> None:
        self._path = Path(os.path.realpath(path))
        self._books = books
        try:
            tempfile.TemporaryFile(dir=self._path.parent).close()
            text = self._path.read_text(encoding="utf-8") if self._path.exists() else None
            if text is not None:
                self._fill(json.loads(text))
        except OSError as error:
            fix = "give the path of a file in a folder that can be written to"
            raise InvalidRequestError(f"{path}: what is learned cannot be kept here: {error.strerror}; {fix}") from None
        except (ValueError, RecursionError) as error:
            fix = "delete the file to begin anew, or give another one"
            raise InvalidRequestError(f"{path}: this is not what an engine has learned: {error}; {fix}") from None

    def save(self) -> None:
        """Puts what the books know now in the place of the file, as a whole or not at all. Warns if that fails."""
        try:
            _replace(self._path, {name: getattr(self._books, name).to_json() for name in FIELDS})
        except OSError as error:
            text = f"{self._path}: what was learned could not be kept: {error.strerror}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _fill(self, values: object) -> None:
        if not isinstance(values, dict) or values.keys() != set(FIELDS):
            raise ValueError(f"its fields are not {', '.join(FIELDS)}")
        spreads = {name: Spreads.from_json(values[name]) for name in FIELDS}
        for name, learned in spreads.items():
            setattr(self._books, name, learned)


def _replace(path: Path, values: object) -> None:
    """The rename comes last, when the bytes are on disk: a file at `path` is whole."""
    temporary = path.with_name(f".treadle-{secrets.token_hex(8)}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(json.dumps(values, separators=(",", ":")))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
