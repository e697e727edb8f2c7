"""Who may use a server: a file of API keys, each belonging to a tenant with quotas.

    [[tenants]]
    name = "research"
    keys = ["sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"]
    max_programs = 32
    max_tokens_per_minute = 200_000

Keys are made by `treadle key`: 256 random bits. So their plain SHA-256 tells nothing of them, and checking one costs
next to nothing, whoever asks; a word that people choose could be guessed from it and must not be a key.
"""

from __future__ import annotations

import difflib
import hashlib
import hmac
import logging
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.server.errors import ApiError

KEY_PREFIX = "treadle-"
MAX_KEY_CHARACTERS = 512
DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Tenant:
    """Somebody who has programs, KV and quotas of their own. None is no limit.

    Attributes:
        name: Salts all that is kept for this tenant; "" is the one tenant of a server without keys.
        is_admin: Whether it may do what concerns all tenants.
        max_programs: Live programs at once.
        max_tokens_per_minute: Prompt and generated tokens, on average; one minute's worth may be used at once.
        max_queue: Requests that wait for their first token.
        max_kv_bytes: Memory that its programs may keep or use; beyond it, it can begin no further program.
    """

    name: str
    is_admin: bool = False
    max_programs: int | None = None
    max_tokens_per_minute: int | None = None
    max_queue: int | None = None
    max_kv_bytes: int | None = None


EVERYBODY = Tenant("", is_admin=True)
"""Whoever reaches a server that has no keys."""


def new_key() -> str:
    """A key that cannot be guessed."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def key_digest(key: str) -> str:
    """What the keys file says of a key."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


class Tenants:
    """The table of keys and tenants, as the file said when it was last read.

    Without a file everybody is one tenant, who may do everything. Raises `InvalidRequestError` for a file that cannot
    be read or is faulty.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = Path(path) if path is not None else None
        self._by_digest = _read(self._path) if self._path is not None else {}

    @property
    def has_keys(self) -> bool:
        """Whether a request needs a key."""
        return self._path is not None

    def authenticate(self, authorization: str | None) -> Tenant:
        """The tenant whose key an `Authorization` header bears. Raises `ApiError` 401.

        Each known digest is compared in full, so that the time tells nothing of how much of it was right.
        """
        if self._path is None:
            return EVERYBODY
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise _unauthorized("this server needs an API key; send it as 'Authorization: Bearer KEY'")
        if len(key) > MAX_KEY_CHARACTERS:
            raise _unauthorized("this API key is not known here")
        presented = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
        found = None
        for digest, tenant in self._by_digest.items():
            if hmac.compare_digest(digest, presented):
                found = tenant
        if found is None:
            raise _unauthorized("this API key is not known here")
        return found

    def reload(self) -> None:
        """Reads the file again. If it is faulty now, what was read before stays, and the log says so."""
        if self._path is None:
            return
        log = logging.getLogger(__name__)
        try:
            self._by_digest = _read(self._path)
        except InvalidRequestError as error:
            log.error("the keys stay as they were: %s", error)
            return
        log.info("read %d keys from %s", len(self._by_digest), self._path)


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, type="authentication_error", code="invalid_api_key")


def _read(path: Path) -> dict[bytes, Tenant]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequestError(f"{path}: the keys cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InvalidRequestError(f"{path}: this is not TOML: {error}") from None
    try:
        return _tenants_by_digest(table)
    except ValueError as error:
        raise InvalidRequestError(f"{path}: {error}") from None


def _tenants_by_digest(table: Mapping[str, Any]) -> dict[bytes, Tenant]:
    """Raises `ValueError`, which says what is wrong."""
    entries = table.get("tenants")
    if set(table) != {"tenants"} or not isinstance(entries, list) or not entries:
        raise ValueError("a keys file is a list of [[tenants]] and nothing else")
    found: dict[bytes, Tenant] = {}
    names: set[str] = set()
    for entry in entries:
        tenant = _tenant(entry)
        if tenant.name in names:
            raise ValueError(f"the tenant {tenant.name!r} is there twice")
        names.add(tenant.name)
        for digest in _digests(tenant.name, entry.get("keys")):
            if digest in found:
                raise ValueError(f"tenants {found[digest].name!r} and {tenant.name!r} have a key in common")
            found[digest] = tenant
    return found


def _tenant(entry: object) -> Tenant:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ValueError("each of [[tenants]] needs a name")
    name = entry["name"]
    if not TENANT_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a tenant: letters, digits and ._- only, at most 64")
    known = {"keys", *(field.name for field in fields(Tenant))}
    for key, value in entry.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0)
            raise ValueError(f"tenant {name!r}: there is no {key!r}; did you mean {near[0]!r}?")
        if key.startswith("max_") and (type(value) is not int or value < 1):
            raise ValueError(f"tenant {name!r}: {key} is {value!r}; it must be a whole number, and at least 1")
    if not isinstance(entry.get("is_admin", False), bool):
        raise ValueError(f"tenant {name!r}: is_admin is neither true nor false")
    return Tenant(**{key: value for key, value in entry.items() if key != "keys"})


def _digests(name: str, keys: object) -> list[bytes]:
    if not isinstance(keys, list) or not keys:
        raise ValueError(f"tenant {name!r} needs a list of keys")
    found = []
    for key in keys:
        match = DIGEST.fullmatch(key) if isinstance(key, str) else None
        if match is None:
            raise ValueError(
                f"tenant {name!r}: a key is written as 'sha256:' and 64 hexadecimal digits (`treadle key`)"
            )
        found.append(bytes.fromhex(match[1]))
    return found
