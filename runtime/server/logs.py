"""Log lines of a server: text for people or one JSON object a line, each with the id of the request that it is about.

Nothing of what a client sent or a model said is ever logged.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import time
from contextvars import ContextVar
from typing import Literal, TextIO

LOGGER = "treadle"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request that this task works on."""
_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


def new_request_id(proposed: str | None) -> str:
    """The id that a client proposes in `x-request-id`, if it can stand in a header and a log, or else a new one."""
    return proposed if proposed is not None and _ID.fullmatch(proposed) else f"req_{secrets.token_hex(12)}"


def configure_logs(form: Literal["text", "json"], level: str, stream: TextIO | None = None) -> None:
    """Writes Treadle's log lines to `stream`, by default standard error."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logger = logging.getLogger(LOGGER)
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(LEVELS[level])
    logger.propagate = False


def log_request(method: str, endpoint: str, status: int, seconds: float, tenant: str) -> None:
    """One line for a request that was answered."""
    level = logging.WARNING if status >= 500 else logging.INFO
    fields = {"method": method, "endpoint": endpoint, "status": status, "seconds": round(seconds, 6), "tenant": tenant}
    logging.getLogger(f"{LOGGER}.requests").log(level, "answered", extra=fields)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """What was given as `extra`."""
    given = {name: value for name, value in record.__dict__.items() if name not in _STANDARD and value != ""}
    about = request_id.get()
    return {**given, "request_id": about} if about else given


class TextLines(logging.Formatter):
    """`12:00:01 info requests: answered method=POST ...`"""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        name = record.name.rpartition(".")[2]
        text = f"{clock} {record.levelname.lower()} {name}: {_one_line(record.getMessage())}{_one_line(fields)}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JsonLines(logging.Formatter):
    """`{"time": 1700000000.0, "level": "info", "logger": "...", "message": "answered", "method": "POST", ...}`"""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _one_line(text: str) -> str:
    """Text in which nothing passes for a line of its own."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
