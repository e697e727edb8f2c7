"""Who may begin to generate now, and who is told to come back, and when.

There is no queue here: what is admitted goes to the scheduler, which knows whose turn it is. Here is only the bound on
how much may wait there, for all and for each tenant.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from treadle.runtime.server.config import ServerConfig
from treadle.runtime.server.errors import ApiError
from treadle.runtime.server.tenants import Tenant

MINUTE_S = 60.0
SMOOTHING = 0.1
"""Weight of the latest request in the average of how often one ends."""


class Ticket:
    """One admitted request. Use as `with`; leaving the scope makes room for the next."""

    def __init__(self, admission: Admission, tenant: Tenant) -> None:
        self.tenant = tenant
        self._admission = admission
        self._waits = True

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.began()
        self._admission.left()

    def began(self) -> None:
        """The first token is there: the request waits no longer. Further times change nothing."""
        if self._waits:
            self._waits = False
            self._admission.began(self.tenant)

    def charge(self, num_tokens: int) -> None:
        """Counts tokens against the tenant's quota, when they are used."""
        self._admission.charge(self.tenant, num_tokens)


@dataclass(slots=True)
class _Allowance:
    """Tokens that a tenant may use now; below 0 it has used some of the next minute's. `at`: when that was so."""

    tokens: float
    at: float


class Admission:
    """Counts requests and tokens. `clock` gives seconds."""

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_requests = config.max_requests
        self._clock = clock
        self._num_requests = 0
        self._waiting: dict[str, int] = {}
        self._allowances: dict[str, _Allowance] = {}
        self._kv_bytes: Mapping[str, int] = {}
        self._left_at: float | None = None
        self._interval_s = 1.0

    @property
    def num_requests(self) -> int:
        """Generating requests, waiting ones too."""
        return self._num_requests

    @property
    def num_waiting(self) -> int:
        """Requests that have no token yet."""
        return sum(self._waiting.values())

    def admit(self, tenant: Tenant) -> Ticket:
        """Takes a request on. Raises `ApiError` 429 if this tenant, or all together, have as much as they may."""
        waiting = self._waiting.get(tenant.name, 0)
        if self._num_requests >= self._max_requests:
            text = f"the server is busy with {self._num_requests} requests"
            raise _come_back(text, "server_busy", self._interval_s)
        if tenant.max_queue is not None and waiting >= tenant.max_queue:
            text = f"{waiting} requests of yours wait already; your quota is {tenant.max_queue}"
            raise _come_back(text, "queue_quota", self._interval_s)
        if tenant.max_tokens_per_minute is not None:
            missing = -self._level(tenant, tenant.max_tokens_per_minute)
            if missing >= 0:
                text = f"your quota of {tenant.max_tokens_per_minute} tokens a minute is used up"
                raise _come_back(text, "token_quota", (missing + 1) * MINUTE_S / tenant.max_tokens_per_minute)
        self._num_requests += 1
        self._waiting[tenant.name] = waiting + 1
        return Ticket(self, tenant)

    def admit_program(self, tenant: Tenant) -> None:
        """Raises `ApiError` 429 if a tenant's programs hold so much memory that it may not begin another one now.

        A program that has begun is never refused for memory: only by going on does it come to its end.
        """
        used = self._kv_bytes.get(tenant.name, 0)
        if tenant.max_kv_bytes is not None and used >= tenant.max_kv_bytes:
            text = f"your programs hold {used} bytes of KV; your quota is {tenant.max_kv_bytes}"
            raise _come_back(text, "kv_quota", self._interval_s)

    def observe_kv(self, bytes_by_tenant: Mapping[str, int]) -> None:
        """Takes note of the memory that tenants' programs use or keep leased, as the scheduler last told."""
        self._kv_bytes = bytes_by_tenant

    def began(self, tenant: Tenant) -> None:
        """For a ticket: its request waits no longer."""
        left = self._waiting[tenant.name] - 1
        if left:
            self._waiting[tenant.name] = left
        else:
            del self._waiting[tenant.name]

    def left(self) -> None:
        """For a ticket: its request is over."""
        self._num_requests -= 1
        now = self._clock()
        if self._left_at is not None:
            self._interval_s += SMOOTHING * (now - self._left_at - self._interval_s)
        self._left_at = now

    def charge(self, tenant: Tenant, num_tokens: int) -> None:
        """For a ticket: tokens were used."""
        if tenant.max_tokens_per_minute is not None:
            self._level(tenant, tenant.max_tokens_per_minute)
            self._allowances[tenant.name].tokens -= num_tokens

    def _level(self, tenant: Tenant, per_minute: int) -> float:
        """What the tenant may use now: it grows all the time, up to a minute's worth."""
        now = self._clock()
        allowance = self._allowances.setdefault(tenant.name, _Allowance(per_minute, now))
        grown = allowance.tokens + (now - allowance.at) * per_minute / MINUTE_S
        allowance.tokens, allowance.at = min(float(per_minute), grown), now
        return allowance.tokens


def _come_back(message: str, code: str, seconds: float) -> ApiError:
    wait = float(min(MINUTE_S, max(1, math.ceil(seconds))))
    return ApiError(429, f"{message}; try again in {wait:g} s", type="rate_limit_error", code=code, retry_after=wait)
