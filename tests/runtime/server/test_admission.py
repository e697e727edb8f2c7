"""Requests and tokens are counted, for all and for each tenant; who has too many is told when to come back."""

import pytest

from treadle.runtime.server.admission import Admission
from treadle.runtime.server.config import ServerConfig
from treadle.runtime.server.errors import ApiError
from treadle.runtime.server.tenants import Tenant

ALICE, BOB = Tenant("alice"), Tenant("bob", max_queue=1)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def admission(**settings):
    clock = Clock()
    return Admission(ServerConfig(**settings), clock), clock


def refusal(call, *arguments):
    with pytest.raises(ApiError) as caught:
        call(*arguments)
    assert (caught.value.status, caught.value.type) == (429, "rate_limit_error")
    return caught.value


def test_a_server_that_is_full_says_when_to_come_back():
    gate, _ = admission(max_requests=2)
    with gate.admit(ALICE):
        with gate.admit(ALICE):
            error = refusal(gate.admit, ALICE)
            assert error.code == "server_busy" and error.retry_after >= 1
        assert gate.num_requests == 1
        gate.admit(ALICE)


def test_a_request_that_fails_makes_room_too():
    gate, _ = admission(max_requests=1)
    with pytest.raises(RuntimeError), gate.admit(ALICE):
        raise RuntimeError
    assert (gate.num_requests, gate.num_waiting) == (0, 0)


def test_a_tenants_queue_holds_what_has_no_token_yet():
    gate, _ = admission()
    with gate.admit(BOB) as first:
        assert refusal(gate.admit, BOB).code == "queue_quota"
        gate.admit(ALICE)
        first.began()
        first.began()
        with gate.admit(BOB):
            assert gate.num_waiting == 2
    assert (gate.num_requests, gate.num_waiting) == (1, 1)


def test_tokens_a_minute_are_a_debt_that_time_pays():
    tenant = Tenant("carol", max_tokens_per_minute=600)
    gate, clock = admission()
    with gate.admit(tenant) as ticket:
        ticket.charge(640)
    error = refusal(gate.admit, tenant)
    assert (error.code, error.retry_after) == ("token_quota", 5)
    clock.now = error.retry_after
    with gate.admit(tenant):
        pass


def test_an_idle_tenant_saves_no_more_than_a_minutes_worth():
    tenant = Tenant("carol", max_tokens_per_minute=600)
    gate, clock = admission()
    gate.admit(tenant).charge(10)
    clock.now = 3600.0
    gate.admit(tenant).charge(600)
    assert refusal(gate.admit, tenant).code == "token_quota"


def test_a_wait_is_never_longer_than_a_minute():
    tenant = Tenant("carol", max_tokens_per_minute=1)
    gate, _ = admission()
    gate.admit(tenant).charge(10**9)
    assert refusal(gate.admit, tenant).retry_after == 60


def test_a_tenant_whose_programs_fill_its_memory_begins_no_other_one():
    gate, _ = admission()
    tenant = Tenant("carol", max_kv_bytes=1000)
    gate.observe_kv({"carol": 999, "alice": 10**9})
    gate.admit_program(tenant)
    gate.observe_kv({"carol": 1000})
    assert refusal(gate.admit_program, tenant).code == "kv_quota"
    gate.admit_program(ALICE)


def test_the_wait_follows_how_often_a_request_ends():
    gate, clock = admission(max_requests=1)
    for _ in range(50):
        with gate.admit(ALICE):
            clock.now += 7.0
    with gate.admit(ALICE):
        assert refusal(gate.admit, ALICE).retry_after == 7
