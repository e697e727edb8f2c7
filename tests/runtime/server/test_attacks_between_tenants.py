"""What one tenant may try against another: its ids, its cache, its share of the server."""

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import pytest
from support.serving import served, tiny_engine

from treadle.runtime.server.tenants import key_digest, new_key

PAGE_TOKENS = 4
ADMIN, ALICE, BOB, CAROL, DAVE = (new_key() for _ in range(5))
QUOTAS = {
    "root": (ADMIN, "is_admin = true"),
    "alice": (ALICE, ""),
    "bob": (BOB, ""),
    "carol": (CAROL, "max_programs = 2\nmax_queue = 1"),
    "dave": (DAVE, "max_tokens_per_minute = 50"),
}
LONG = list(range(1, 200))


def keys_text(quotas):
    return "".join(
        f'[[tenants]]\nname = "{name}"\nkeys = ["{key_digest(key)}"]\n{quota}\n'
        for name, (key, quota) in quotas.items()
    )


@pytest.fixture(scope="module")
def shared(tokenizer, tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(keys_text(QUOTAS))
    with served(partial(tiny_engine, tokenizer), keys=str(file), max_programs=64) as server:
        yield server


@pytest.fixture(scope="module")
def by_key(shared):
    """A client for each key."""
    with ExitStack() as stack:

        def client(key):
            headers = {"Authorization": f"Bearer {key}"}
            return stack.enter_context(httpx.Client(base_url=shared.url, headers=headers, timeout=60))

        yield {key: client(key) for key in (ADMIN, ALICE, BOB, CAROL, DAVE)}


@pytest.fixture
def alice(by_key):
    return by_key[ALICE]


@pytest.fixture
def bob(by_key):
    return by_key[BOB]


def complete(client, prompt=LONG, headers=None, **fields):
    body = {"model": "treadle", "prompt": prompt, "max_tokens": 4, "temperature": 0, **fields}
    return client.post("/v1/completions", json=body, headers=headers or {})


def cached(answer):
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer wrong", f"Basic {ALICE}", f"Bearer {key_digest(ALICE)}"],
    ids=["none", "no key", "wrong key", "another scheme", "the digest"],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/programs"),
        ("GET", "/v1/programs"),
        ("GET", "/v1/events"),
        ("GET", "/v1/models"),
        ("POST", "/tokenize"),
        ("GET", "/metrics"),
    ],
)
def test_without_a_key_nothing_is_done(method, path, authorization, shared):
    headers = {"Authorization": authorization} if authorization else {}
    answer = httpx.request(method, shared.url + path, headers=headers, content=b"{}")
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"


def test_figures_of_all_tenants_are_for_the_admin(by_key):
    assert by_key[ALICE].get("/metrics").status_code == 403
    found = by_key[ADMIN].get("/metrics")
    assert found.status_code == 200 and "alice" not in found.text


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "", None),
        ("DELETE", "", None),
        ("GET", "/graph?format=svg", None),
        ("POST", "/events", {"events": [{"id": "1", "type": "end"}]}),
        ("POST", "/hints", {"hints": [{"action": "release"}]}),
    ],
)
def test_another_tenants_program_is_not_there(method, path, body, alice, bob):
    name = f"mine-{method}-{path[:4].strip('/')}"
    assert alice.post("/v1/programs", json={"id": name}).status_code in (200, 201)
    theirs, nobodys = (bob.request(method, f"/v1/programs/{each}{path}", json=body) for each in (name, f"no-{name}"))
    assert theirs.status_code == nobodys.status_code == 404
    assert theirs.text == nobodys.text.replace(f"no-{name}", name)
    assert alice.get(f"/v1/programs/{name}").status_code == 200
    assert name not in bob.get("/v1/programs").text


def test_one_name_is_two_programs(alice, bob):
    for client in (alice, bob, bob):
        assert complete(client, [7, 8, 9], {"x-treadle-program-id": "same"}).status_code == 200
    turns = [
        sum(node["kind"] == "llm" for node in client.get("/v1/programs/same/graph").json()["nodes"])
        for client in (alice, bob)
    ]
    assert turns == [1, 2]


def test_another_tenants_response_is_not_there(alice, bob):
    first = alice.post("/v1/responses", json={"model": "treadle", "input": "hello", "max_output_tokens": 16})
    assert first.status_code == 200
    response_id = first.json()["id"]
    body = {"model": "treadle", "input": "and", "previous_response_id": response_id, "max_output_tokens": 16}
    assert bob.post("/v1/responses", json=body).status_code in (400, 404)
    assert bob.get(f"/v1/responses/{response_id}").status_code == 404
    assert bob.delete(f"/v1/responses/{response_id}").status_code == 404
    assert alice.post("/v1/responses", json=body).status_code == 200


def test_another_tenants_events_are_not_heard(alice, bob):
    with bob.stream("GET", "/v1/events") as answer:
        lines = answer.iter_lines()
        alice.post("/v1/programs", json={"id": "alices-secret"})
        bob.post("/v1/programs", json={"id": "bobs-own"})
        heard = ""
        while "bobs-own" not in heard:
            heard += next(lines)
    assert "alices-secret" not in heard


def test_not_one_token_is_cached_across_tenants_and_every_counter_says_so(alice, bob, by_key):
    prompt = [11, *LONG]
    assert cached(complete(alice, prompt)) == 0
    own = cached(complete(alice, prompt))
    assert own >= len(prompt) // PAGE_TOKENS * PAGE_TOKENS - PAGE_TOKENS
    before = counted(by_key[ADMIN], "cached")
    theirs = complete(bob, prompt)
    assert cached(theirs) == 0
    assert counted(by_key[ADMIN], "cached") == before
    program = theirs.headers["x-treadle-program-id"]
    account = bob.delete(f"/v1/programs/{program}").json()["account"]
    assert account["cached"] == 0 and account["prefilled"] == len(prompt)


def test_chats_and_answers_share_nothing_across_tenants_either(alice, bob):
    messages = [{"role": "system", "content": "Be brief. " * 20}, {"role": "user", "content": "hello"}]
    chat = {"model": "treadle", "messages": messages, "max_tokens": 16, "temperature": 0}
    for client, expected in ((alice, False), (alice, True), (bob, False)):
        usage = client.post("/v1/chat/completions", json=chat).json()["usage"]
        assert bool(usage["prompt_tokens_details"]["cached_tokens"]) is expected
    ask = {"model": "treadle", "instructions": "Say more. " * 20, "input": "hello", "max_output_tokens": 16}
    for client, expected in ((alice, False), (alice, True), (bob, False)):
        usage = client.post("/v1/responses", json=ask).json()["usage"]
        assert bool(usage["input_tokens_details"]["cached_tokens"]) is expected


def test_a_conversation_is_not_taken_for_another_tenants(alice, bob):
    opening = [{"role": "user", "content": "what only alice said"}]
    first = alice.post("/v1/chat/completions", json={"model": "treadle", "messages": opening, "max_tokens": 3}).json()
    onward = [*opening, first["choices"][0]["message"], {"role": "user", "content": "go on"}]
    body = {"model": "treadle", "messages": onward, "max_tokens": 3}
    theirs = bob.post("/v1/chat/completions", json=body)
    assert theirs.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert alice.get(f"/v1/programs/{theirs.headers['x-treadle-program-id']}").status_code == 404


def counted(client, source):
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(f'treadle_prompt_tokens_total{{source="{source}"}}'):
            return float(line.split()[-1])
    return 0.0


def test_a_tenant_has_no_more_programs_than_its_quota(by_key, shared):
    carol = by_key[CAROL]
    for number in range(10):
        answer = carol.post("/v1/programs", json={"id": f"p{number}"})
        assert answer.status_code in (200, 201, 429)
        assert len(carol.get("/v1/programs").json()["data"]) <= 2


def test_a_tenant_that_used_its_tokens_waits_and_others_do_not(by_key):
    dave = by_key[DAVE]
    assert complete(dave, [1, 2, 3], max_tokens=60).status_code == 200
    refused = complete(dave, [1, 2, 3])
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "token_quota"
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert complete(by_key[BOB], [1, 2, 3]).status_code == 200


def test_ten_thousand_names_of_programs_leave_others_alone(alice, bob, shared):
    alice.post("/v1/programs", json={"id": "stays"})
    before = resident_bytes()
    for number in range(10_000):
        answer = bob.post("/v1/programs", json={"id": f"flood-{number}"})
        assert answer.status_code in (200, 201, 429)
        if number == 2000:
            before = resident_bytes()
    assert resident_bytes() - before < 20 << 20
    assert len(shared.server.programs) <= 64
    assert alice.get("/v1/programs/stays").status_code == 200
    assert complete(alice, [1, 2, 3], {"x-treadle-program-id": "stays"}).status_code == 200
    assert len(shared.engine.scheduler.books.programs) <= 65


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("name", ["", "a\x00b", "x" * 100_000, "../../root", "{}", "a/b", "é" * 300, "\u202e"])
def test_names_of_programs_are_only_names(name, alice):
    answer = alice.post("/v1/programs", content=json.dumps({"id": name}))
    assert answer.status_code in (200, 201, 400)
    by_field = complete(alice, [1, 2], prompt_cache_key=name)
    assert by_field.status_code in (200, 400)


def test_only_the_admin_goes_before_others(alice, shared):
    answer = alice.post("/v1/programs", json={"id": "hasty", "priority": 10})
    assert answer.status_code in (200, 201)
    assert all(program.priority <= 0 for program in shared.engine.scheduler.books.programs.values())


def test_keys_that_were_taken_out_no_longer_work_and_a_faulty_file_changes_nothing(tokenizer, tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text(keys_text(QUOTAS))
    with served(partial(tiny_engine, tokenizer), keys=str(file)) as server:

        def status(key):
            return httpx.get(f"{server.v1}/models", headers={"Authorization": f"Bearer {key}"}).status_code

        assert (status(ALICE), status(BOB)) == (200, 200)
        file.write_text(keys_text({name: quota for name, quota in QUOTAS.items() if name != "alice"}))
        server.server.tenants.reload()
        assert (status(ALICE), status(BOB)) == (401, 200)
        file.write_text("nonsense")
        server.server.tenants.reload()
        assert (status(ALICE), status(BOB)) == (401, 200)
