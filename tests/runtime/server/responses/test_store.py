"""Responses are kept apart by tenant, and only so many, so large and for so long."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from treadle.runtime.server.responses.store import ResponseStore, StoredResponse


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def response(name, text="", previous=None):
    output = [{"type": "message", "id": f"msg_{name}", "role": "assistant", "content": text}]
    given = ({"type": "message", "role": "user", "content": name},)
    return StoredResponse.after(previous, given, {"id": name, "output": output}, "program")


def test_a_response_is_found_by_its_own_tenant_only():
    store = ResponseStore()
    store.put("a", response("r1"))
    assert store.get("a", "r1").id == "r1"
    assert store.get("b", "r1") is None
    assert store.item("b", "msg_r1") is None
    assert not store.delete("b", "r1") and store.get("a", "r1")


def test_a_history_holds_all_turns_even_when_earlier_responses_are_gone():
    store = ResponseStore()
    store.put("a", response("r1"))
    store.put("a", response("r2", previous=store.get("a", "r1")))
    assert store.delete("a", "r1")
    assert store.get("a", "r1") is None
    said = [item["content"] for item in store.get("a", "r2").history.all_items() if item["role"] == "user"]
    assert said == ["r1", "r2"]


def test_what_was_not_used_for_longest_goes_first():
    store = ResponseStore(max_responses=2)
    store.put("a", response("r1"))
    store.put("a", response("r2"))
    store.get("a", "r1")
    store.put("a", response("r3"))
    assert [store.get("a", name) is not None for name in ("r1", "r2", "r3")] == [True, False, True]


def test_one_tenant_cannot_push_out_the_responses_of_another():
    store = ResponseStore(max_responses=2)
    store.put("a", response("mine"))
    for index in range(10):
        store.put("b", response(f"r{index}"))
    assert store.get("a", "mine") is not None


def test_bytes_are_bounded_and_a_response_that_is_too_large_is_not_kept():
    store = ResponseStore(max_bytes=10_000)
    store.put("a", response("small"))
    store.put("a", response("large", "x" * 20_000))
    assert store.get("a", "large") is None


def test_a_response_expires_when_nobody_uses_it():
    clock = Clock()
    store = ResponseStore(idle_s=60, clock=clock)
    store.put("a", response("r1"))
    clock.now = 50
    assert store.get("a", "r1") is not None
    clock.now = 100
    assert store.get("a", "r1") is not None
    clock.now = 161
    assert store.get("a", "r1") is None and store.item("a", "msg_r1") is None


class Machine(RuleBasedStateMachine):
    """Any order of uses, against plain dictionaries that never forget."""

    names = Bundle("names")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.store = ResponseStore(max_responses=3, max_bytes=2_000, idle_s=10, clock=self.clock)
        self.all: dict[tuple[str, str], StoredResponse] = {}
        self.deleted: set[tuple[str, str]] = set()

    @rule(target=names, tenant=st.sampled_from("ab"), size=st.integers(0, 900), index=st.integers(0, 10_000))
    def put(self, tenant, size, index):
        name = (tenant, f"r{len(self.all)}-{index}")
        self.all[name] = response(name[1], "x" * size)
        self.store.put(tenant, self.all[name])
        return name

    @rule(name=names)
    def get(self, name):
        found = self.store.get(*name)
        assert found is None or found is self.all[name]
        assert found is None or name not in self.deleted
        assert (self.store.item(name[0], f"msg_{name[1]}") is None) == (found is None)

    @rule(name=names)
    def delete(self, name):
        self.store.delete(*name)
        self.deleted.add(name)

    @rule(seconds=st.floats(0, 8))
    def wait(self, seconds):
        self.clock.now += seconds

    @invariant()
    def bounds_hold(self):
        for shelf in self.store._shelves.values():
            kept = [stored for stored, _ in shelf.responses.values()]
            assert len(kept) <= 3 and sum(stored.num_bytes for stored in kept) == shelf.num_bytes <= 2_000
            assert len(shelf.outputs) == len(kept)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
