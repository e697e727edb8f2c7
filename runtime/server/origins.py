"""Which names and which web pages a server answers to.

A server on a loopback address trusts whoever is on the machine, and a browser is: a page that resolves its own name to
127.0.0.1 (DNS rebinding), or that posts to another origin, would speak for its user. Such requests name the page's own
host in `Host` or `Origin`, and pages cannot choose either.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from treadle.runtime.server.config import LOOPBACK, ServerConfig
from treadle.runtime.server.errors import ApiError

ALLOWED_METHODS = "GET, POST, DELETE, OPTIONS"
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]+)?")


def check_origin(headers: Mapping[str, str], config: ServerConfig) -> None:
    """Raises `ApiError` 403 for a request to a name that is not ours, or from a page that may not use the server."""
    host = headers.get("Host", "")
    if not _is_ours(_name_of(host), config):
        text = f"this server is not called {host[:80]!r}; add the name to allowed_hosts if it should be"
        raise _forbidden(text, "host_not_allowed")
    origin = headers.get("Origin")
    if origin is None or origin in config.allowed_origins:
        return
    if _place_of(origin) != host.lower():
        text = f"pages of {origin[:80]!r} may not use this server; add it to allowed_origins if they should"
        raise _forbidden(text, "origin_not_allowed")


def cors_headers(headers: Mapping[str, str], config: ServerConfig) -> dict[str, str]:
    """What tells a browser that an allowed page may read the answer; nothing for any other."""
    origin = headers.get("Origin")
    if origin is None or origin not in config.allowed_origins:
        return {}
    asked = headers.get("Access-Control-Request-Headers", "authorization, content-type")
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": ALLOWED_METHODS,
        "Access-Control-Allow-Headers": asked,
        "Access-Control-Expose-Headers": "x-request-id, x-treadle-program-id, retry-after",
        "Access-Control-Max-Age": "600",
        "Vary": "Origin",
    }


def _place_of(origin: str) -> str:
    """The host and port of an origin as a `Host` header would have it; "" for `null` and what is no origin."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _name_of(host: str) -> str:
    """A `Host` header without its port; "" for what is no such header (RFC 9110, section 7.2)."""
    match = _HOST.fullmatch(host)
    return match[1].strip("[]").rstrip(".").lower() if match else ""


def _is_ours(name: str, config: ServerConfig) -> bool:
    """Names that resolve to us. An address cannot be rebound; a name can, so it must be known or need a key."""
    if name in LOOPBACK or name == config.host.lower() or name in map(str.lower, config.allowed_hosts):
        return True
    if config.is_local:
        return False
    return _is_address(name) or (config.keys is not None and not config.allowed_hosts)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _forbidden(message: str, code: str) -> ApiError:
    return ApiError(403, message, type="permission_error", code=code)
