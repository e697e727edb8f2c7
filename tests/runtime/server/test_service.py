"""What a server says of itself, and what all of its answers have in common."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version

import httpx
import pytest
from support.serving import served, tiny_engine

from treadle.runtime.server.tenants import key_digest

MESSAGES = [{"role": "user", "content": "Hello <|im_end|>"}]


def test_the_models_are_listed_by_all_their_names(serve):
    with serve(aliases=("gpt-4o", "org/small")) as server, httpx.Client(base_url=server.url) as http:
        names = ["smollm2", "gpt-4o", "org/small"]
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == names
        for name in [*names, "treadle"]:
            assert http.get(f"/v1/models/{name}").json()["id"] == name
            answer = http.post("/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 1})
            assert answer.json()["model"] == name
        missing = http.get("/v1/models/other")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz"])
def test_a_server_that_is_well_says_so(http, path):
    assert (http.get(path).status_code, http.get(path).json()) == (200, {"status": "ok"})


def test_the_version_is_told(http):
    assert http.get("/version").json() == {"version": version("treadle")}


def test_embeddings_are_not_supported_and_that_is_said_cleanly(http):
    answer = http.post("/v1/embeddings", json={"model": "smollm2", "input": "text"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "unsupported_endpoint"


def test_text_is_tokenized_as_prompts_are(http, tokenizer):
    text = http.post("/tokenize", json={"prompt": "Hello <|im_end|>"}).json()
    assert text["tokens"] == tokenizer.encode("Hello <|im_end|>") and text["count"] == len(text["tokens"])
    chat = http.post("/tokenize", json={"messages": MESSAGES}).json()
    body = {"model": "smollm2", "messages": MESSAGES, "max_completion_tokens": 1}
    usage = http.post("/v1/chat/completions", json=body).json()["usage"]
    assert chat["count"] == usage["prompt_tokens"] and chat["max_model_len"] == 2048
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert http.post("/tokenize", json={"messages": MESSAGES, "tools": tools}).json()["count"] > chat["count"]
    assert http.post("/tokenize", json={}).status_code == 400


def test_a_request_id_is_echoed_or_made(http):
    assert http.get("/version", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = [http.get("/nowhere").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1] and all(made)
    forged = http.get("/version", headers={"x-request-id": "a b"}).headers["x-request-id"]
    assert forged != "a b"


def test_what_is_not_there_is_an_error_object(http):
    missing, wrong = http.get("/v1/nothing"), http.get("/v1/chat/completions")
    assert missing.status_code == 404 and missing.json()["error"]["type"] == "not_found_error"
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert set(wrong.json()["error"]) == {"message", "type", "param", "code"}


def test_the_server_does_not_tell_what_it_is_made_of(http):
    assert http.get("/version").headers["server"] == "treadle"


def test_a_server_with_keys_wants_one_but_for_its_health(serve, tmp_path):
    key = "k" * 40
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[tenants]]\nname = "a"\nkeys = ["{key_digest(key)}"]\n')
    with serve(keys=str(keys)) as server, httpx.Client(base_url=server.url) as http:
        for path in ("/health", "/livez", "/readyz", "/version", "/openapi.json"):
            assert http.get(path).status_code == 200
        refused = http.get("/v1/models")
        assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        metrics = http.get("/metrics", headers={"authorization": f"Bearer {key}"})
        assert metrics.status_code == 403 and metrics.json()["error"]["code"] == "admin_only"


def test_a_page_that_is_allowed_may_ask_beforehand(serve):
    page = {"origin": "https://app.example"}
    with serve(allowed_origins=("https://app.example",)) as server, httpx.Client(base_url=server.url) as http:
        asked = http.options(
            "/v1/chat/completions",
            headers={**page, "access-control-request-method": "POST", "access-control-request-headers": "content-type"},
        )
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-origin"] == "https://app.example"
        assert http.get("/v1/models", headers=page).headers["access-control-allow-origin"] == "https://app.example"
        stranger = http.get("/v1/models", headers={"origin": "https://evil.example"})
        assert stranger.status_code == 403 and "access-control-allow-origin" not in stranger.headers


def test_a_model_without_a_tokenizer_takes_and_gives_token_ids():
    with served(partial(tiny_engine, None)) as server, httpx.Client(base_url=server.url) as http:
        body = {"model": "smollm2", "prompt": [1, 2, 3], "max_tokens": 5, "return_token_ids": True}
        choice = http.post("/v1/completions", json=body).json()["choices"][0]
        assert len(choice["token_ids"]) == 5 and choice["text"] == ""
        for path, content in [
            ("/v1/chat/completions", {"model": "smollm2", "messages": MESSAGES}),
            ("/v1/completions", {"model": "smollm2", "prompt": "text"}),
        ]:
            assert http.post(path, json=content).status_code == 400
