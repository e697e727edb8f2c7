"""A server answers to its own names, and to web pages that it was told of."""

import pytest

from treadle.runtime.server.config import ServerConfig
from treadle.runtime.server.errors import ApiError
from treadle.runtime.server.origins import check_origin, cors_headers

LOCAL = ServerConfig()


def is_allowed(config, host, origin=None):
    try:
        check_origin({"Host": host} | ({} if origin is None else {"Origin": origin}), config)
    except ApiError as error:
        return error.status != 403
    return True


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:1", "localhost."]
)
def test_a_local_server_answers_to_local_names(host):
    assert is_allowed(LOCAL, host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example@127.0.0.1@x",
        "192.168.0.1",
        "[::1",
        "127.0.0.1#.evil.example:x",
    ],
)
def test_a_name_that_was_rebound_to_us_is_refused(host):
    assert not is_allowed(LOCAL, host)


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (None, True),
        ("http://localhost:8000", True),
        ("http://localhost:3000", False),
        ("https://evil.example", False),
        ("null", False),
        ("", False),
        ("http://[", False),
        ("http://localhost:8000.evil.example", False),
    ],
)
def test_only_pages_of_our_own_may_post(origin, expected):
    assert is_allowed(LOCAL, "localhost:8000", origin) is expected


def test_names_and_pages_can_be_allowed():
    config = ServerConfig(allowed_hosts=("gpu.lan",), allowed_origins=("https://app.example",))
    assert is_allowed(config, "gpu.lan:8000", "https://app.example")
    assert is_allowed(config, "127.0.0.1:8000")
    assert not is_allowed(config, "other.lan:8000")
    assert not is_allowed(config, "gpu.lan:8000", "https://app.example.evil.example")


@pytest.mark.parametrize("opened", [{"open_access": True}, {"keys": "keys.toml"}])
def test_a_server_that_has_names_is_still_reached_by_its_addresses(opened):
    config = ServerConfig(host="0.0.0.0", allowed_hosts=("GPU.lan",), **opened)
    assert is_allowed(config, "10.0.0.7:8000") and is_allowed(config, "[fd00::7]:8000")
    assert is_allowed(config, "gpu.lan:8000") and is_allowed(config, "GPU.LAN")
    assert not is_allowed(config, "other.lan:8000")


def test_an_open_server_answers_to_addresses_and_one_with_keys_to_any_name():
    opened, keyed = ServerConfig(host="0.0.0.0", open_access=True), ServerConfig(host="0.0.0.0", keys="keys.toml")
    assert is_allowed(opened, "10.0.0.7:8000")
    assert not is_allowed(opened, "evil.example:8000")
    assert is_allowed(keyed, "gpu.lan:8000")
    assert not is_allowed(keyed, "gpu.lan:8000", "https://evil.example")


def test_only_an_allowed_page_is_told_that_it_may_read():
    config = ServerConfig(allowed_origins=("https://app.example",))
    assert (
        cors_headers({"Origin": "https://app.example"}, config)["Access-Control-Allow-Origin"] == "https://app.example"
    )
    assert cors_headers({"Origin": "https://evil.example"}, config) == {}
    assert cors_headers({}, config) == {}
