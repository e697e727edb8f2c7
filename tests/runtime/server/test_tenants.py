"""A keys file says who may use a server; it holds no key, and a faulty one changes nothing."""

import hashlib
import logging

import pytest

from treadle.runtime.cli.main import main
from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.server.errors import ApiError
from treadle.runtime.server.tenants import EVERYBODY, Tenants, key_digest, new_key

ALICE, BOB = ("treadle-" + letter * 43 for letter in "ab")
FILE = f"""
[[tenants]]
name = "alice"
keys = ["{key_digest(ALICE)}"]
is_admin = true

[[tenants]]
name = "bob"
keys = ["{key_digest(new_key())}", "{key_digest(BOB)}"]
max_programs = 2
max_tokens_per_minute = 600
max_queue = 3
max_kv_bytes = 4096
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(FILE)
    return path


def test_without_a_file_everybody_is_one_tenant():
    assert Tenants().authenticate(None) is EVERYBODY
    assert Tenants().authenticate("Bearer anything") is EVERYBODY
    assert not Tenants().has_keys


def test_a_key_tells_whose_request_it_is(file):
    tenants = Tenants(file)
    assert tenants.authenticate(f"Bearer {ALICE}").name == "alice"
    bob = tenants.authenticate(f"bearer  {BOB} ")
    assert (bob.name, bob.is_admin, bob.max_programs, bob.max_queue) == ("bob", False, 2, 3)
    assert (bob.max_tokens_per_minute, bob.max_kv_bytes) == (600, 4096)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {ALICE}",
        ALICE,
        f"Bearer {ALICE[:-1]}",
        f"Bearer {ALICE}x",
        "Bearer \udcff",
    ],
)
def test_any_other_header_is_refused(header, file):
    with pytest.raises(ApiError) as caught:
        Tenants(file).authenticate(header)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert ALICE not in caught.value.message


def test_what_stands_in_the_file_is_no_key(file):
    with pytest.raises(ApiError):
        Tenants(file).authenticate(f"Bearer {key_digest(ALICE)}")


def test_an_endless_key_is_not_even_hashed(file, monkeypatch):
    monkeypatch.setattr(hashlib, "sha256", None)
    with pytest.raises(ApiError):
        Tenants(file).authenticate("Bearer " + "x" * 10_000)


def test_a_file_that_is_read_again_replaces_the_keys(file):
    tenants = Tenants(file)
    file.write_text(f'[[tenants]]\nname = "carol"\nkeys = ["{key_digest(BOB)}"]')
    tenants.reload()
    assert tenants.authenticate(f"Bearer {BOB}").name == "carol"
    with pytest.raises(ApiError):
        tenants.authenticate(f"Bearer {ALICE}")


@pytest.mark.parametrize("text", ["", "[[tenants]]", "nonsense", None])
def test_a_faulty_file_leaves_the_keys_as_they_were(text, file, caplog):
    tenants = Tenants(file)
    file.unlink() if text is None else file.write_text(text)
    with caplog.at_level(logging.INFO):
        tenants.reload()
    assert tenants.authenticate(f"Bearer {ALICE}").name == "alice"
    assert "the keys stay as they were" in caplog.text


KEY = f'keys = ["{key_digest(ALICE)}"]'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a list of"),
        ("tenants = 3", "a list of"),
        (f'[[tenants]]\nname = "a"\n{KEY}\n[server]\nport = 1', "nothing else"),
        (f"[[tenants]]\n{KEY}", "needs a name"),
        (f'[[tenants]]\nname = "a b"\n{KEY}', "no name for a tenant"),
        (f'[[tenants]]\nname = ""\n{KEY}', "no name for a tenant"),
        ('[[tenants]]\nname = "a"', "list of keys"),
        (f'[[tenants]]\nname = "a"\nkeys = ["{ALICE}"]', "sha256"),
        (f'[[tenants]]\nname = "a"\n{KEY}\nmax_program = 1', "did you mean 'max_programs'"),
        (f'[[tenants]]\nname = "a"\n{KEY}\nmax_queue = true', "whole number"),
        (f'[[tenants]]\nname = "a"\n{KEY}\nmax_queue = 0', "at least 1"),
        (f'[[tenants]]\nname = "a"\n{KEY}\nis_admin = 1', "is_admin"),
        (f'[[tenants]]\nname = "a"\n{KEY}\n[[tenants]]\nname = "a"\n{KEY}', "there twice"),
        (f'[[tenants]]\nname = "a"\n{KEY}\n[[tenants]]\nname = "b"\n{KEY}', "in common"),
        ("[[tenants]", "not TOML"),
    ],
)
def test_a_faulty_file_is_refused_at_the_start(text, message, tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match=message) as caught:
        Tenants(path)
    assert ALICE not in str(caught.value)


def test_the_command_makes_a_key_and_its_entry(tmp_path, capsys):
    assert main(["key", "dave"]) == 0
    printed = capsys.readouterr()
    path = tmp_path / "keys.toml"
    path.write_text(printed.out)
    key = printed.err.split()[-1]
    assert Tenants(path).authenticate(f"Bearer {key}").name == "dave"
    assert key not in printed.out
