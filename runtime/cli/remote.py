"""A running server, as the commands see it that look at one: its address, a key, and JSON over HTTP."""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

from treadle.runtime.errors import TreadleError

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 10.0


class RemoteError(TreadleError):
    """A server that does not answer, or not with what was asked for."""


class Remote:
    """Asks a server. No proxy is used: servers are near."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise RemoteError(f"{url!r} is no address of a server; give one as {DEFAULT_URL}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = key
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def json(self, path: str, **query: object) -> Any:
        """The JSON at a path. Raises `RemoteError`, which says what to do."""
        try:
            return json.loads(self.text(path, **query))
        except ValueError as error:
            raise RemoteError(f"{self.url} answers with something else than JSON; is it a Treadle server?") from error

    def text(self, path: str, **query: object) -> str:
        """The text at a path."""
        address = f"{self.url}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            with self._opener.open(urllib.request.Request(address, headers=headers), timeout=TIMEOUT_S) as answer:
                return str(answer.read().decode(errors="replace"))
        except urllib.error.HTTPError as error:
            raise RemoteError(self._refusal(error)) from error
        except (OSError, HTTPException, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            start = "start one with `treadle serve`, or name another with --url or TREADLE_URL"
            raise RemoteError(f"no server answers at {self.url} ({reason}); {start}") from error

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        if error.code == 401:
            return f"{self.url} needs an API key; give it with --api-key or TREADLE_KEY"
        try:
            said = json.loads(error.read())["error"]["message"]
        except (ValueError, KeyError, TypeError, OSError):
            return f"{self.url} answers {error.code} {error.reason}; is it a Treadle server?"
        return printable(str(said))


def add_remote_options(parser: argparse.ArgumentParser) -> None:
    """Adds what names a server."""
    parser.add_argument(
        "--url", default=os.environ.get("TREADLE_URL", DEFAULT_URL), help=f"of the server (default: {DEFAULT_URL})"
    )
    parser.add_argument(
        "--api-key", default=os.environ.get("TREADLE_KEY"), metavar="KEY", help="where the server needs one"
    )


def remote_of(args: argparse.Namespace) -> Remote:
    """The server that the options name."""
    return Remote(args.url, args.api_key)


def program_path(program_id: str) -> str:
    """Where a program is."""
    return f"/v1/programs/{urllib.parse.quote(program_id, safe='')}"


def printable(text: str) -> str:
    """Text that others chose, for a terminal: control characters would be obeyed."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def doing(program: Mapping[str, Any]) -> str:
    """What a program does now, in a few words."""
    tools = [f"{printable(wait['tool'])} {duration(wait['seconds'])}" for wait in program["waits_for"]]
    if program["state"] == "tool":
        return f"waits for {', '.join(tools[:3])}" + (f" and {len(tools) - 3} more" if len(tools) > 3 else "")
    if program["state"] == "person":
        return f"waits for its next request, {duration(program['idle_s'])}"
    return str(program["state"])
