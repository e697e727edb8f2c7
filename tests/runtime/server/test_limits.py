"""Bodies are read strictly and within bounds; whatever else comes is refused with an error that says why."""

import asyncio
import json
from functools import partial

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given
from hypothesis import strategies as st

from treadle.grammar import ToolSpec
from treadle.runtime.server.config import ServerConfig
from treadle.runtime.server.errors import ApiError
from treadle.runtime.server.limits import MAX_KEYS, check_characters, check_conversation, parse_json, read_json

DEPTH = 64
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


def refused(body, depth=DEPTH):
    with pytest.raises(ApiError) as caught:
        parse_json(body if isinstance(body, bytes) else body.encode(), depth)
    assert caught.value.status == 400
    assert len(caught.value.message) < 200
    return caught.value


@given(VALUES, st.booleans())
def test_every_value_of_json_comes_through(value, as_ascii):
    assert parse_json(json.dumps(value, ensure_ascii=as_ascii).encode(), 100) == value


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("", "invalid_json"),
        ("{", "invalid_json"),
        ("[1,]", "invalid_json"),
        ("{'a': 1}", "invalid_json"),
        ('{"a": 1} x', "invalid_json"),
        ('"\n"', "invalid_json"),
        (b'{"a": "\xff"}', "invalid_json"),
        (b"\xff\xfe{\x00}\x00", "invalid_json"),
        ('\ufeff{"a": 1}', "invalid_json"),
        ('{"n": NaN}', "not_finite"),
        ('{"n": Infinity}', "not_finite"),
        ('{"n": [-Infinity]}', "not_finite"),
        ('{"n": 1e999}', "number_too_large"),
        ('{"n": -1e999}', "number_too_large"),
        ('{"n": ' + "9" * 100_000 + "}", "number_too_large"),
        ('{"n": 9223372036854775808}', "number_too_large"),
        ('{"a": 1, "b": 2, "a": 1}', "duplicate_key"),
        ('{"b": [{"a": 1, "a": 2}]}', "duplicate_key"),
        ('{"a": 1, "\\u0061": 2}', "duplicate_key"),
        ('{"a": "\\ud800"}', "invalid_text"),
        ('{"\\udfff": 1}', "invalid_text"),
        ('["\\ude00\\ud83d"]', "invalid_text"),
    ],
)
def test_what_readers_of_json_disagree_about_is_refused(body, code):
    assert refused(body).code == code


def test_an_object_of_too_many_keys_is_refused():
    def object_of(count):
        return json.dumps({str(key): key for key in range(count)})

    assert len(parse_json(object_of(MAX_KEYS).encode(), DEPTH)) == MAX_KEYS
    assert refused(object_of(MAX_KEYS + 1)).code == "too_many_keys"


def test_a_pair_of_surrogates_is_a_character():
    assert parse_json(b'["\\ud83d\\ude00", "\\\\ud800"]', DEPTH) == ["\U0001f600", "\\ud800"]


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":'])
def test_deep_json_is_refused_before_it_is_built(opening):
    levels = opening.count("[") + opening.count("{")
    fits = DEPTH // levels
    closing = "".join({"[": "]", "{": "}"}[sign] for sign in reversed(opening) if sign in "[{")
    parse_json((opening * fits + "1" + closing * fits).encode(), DEPTH)
    assert refused(opening * (fits + 1) + "1" + closing * (fits + 1)).code == "json_too_deep"
    assert refused(opening * 1_000_000).code == "json_too_deep"


def test_many_brackets_side_by_side_or_in_text_are_not_deep():
    wide = [[] for _ in range(1000)] + ["[" * 1000, '"[{' * 1000, "\\" * 1001]
    assert parse_json(json.dumps(wide).encode(), 2) == wide


@pytest.mark.parametrize("body", ['"' + "\\" * 2_000_000, '["' * 1_000_000, '{"a' + "\\u" * 1_000_000, "[]," * 700_000])
def test_a_large_body_that_is_wrong_costs_no_more_than_a_large_one(body):
    refused(body)  # one that goes back would take for ever


def test_conversations_are_counted_before_they_become_tokens():
    config = ServerConfig(max_messages=2, max_prompt_characters=20)
    check_conversation([{"role": "user", "content": "short"}], config)
    with pytest.raises(ApiError) as caught:
        check_conversation([{}] * 3, config)
    assert (caught.value.code, caught.value.param) == ("too_many_messages", "messages")
    with pytest.raises(ApiError) as caught:
        check_conversation([{"role": "user", "content": [{"type": "text", "text": "x" * 21}]}], config)
    assert caught.value.code == "prompt_too_long"
    with pytest.raises(ApiError):
        check_characters(["x" * 10] * 3, config, "prompt")


def test_tools_count_as_part_of_the_conversation():
    config = ServerConfig(max_prompt_characters=30)
    check = partial(check_conversation, [{"role": "user", "content": "short"}], config)
    assert check() == len("roleusercontentshort")
    assert check(tools=[ToolSpec("f", "for it", "{}")]) == check() + len("ffor it{}")
    with pytest.raises(ApiError) as caught:
        check(tools=[ToolSpec("f", "for it", '{"type": "object"}')])
    assert (caught.value.code, caught.value.param) == ("prompt_too_long", "messages")


@pytest.fixture
async def client():
    async def handler(request):
        try:
            return web.json_response(await read_json(request, config))
        except ApiError as error:
            return web.json_response(error.body, status=error.status)

    config = ServerConfig(max_body_bytes=1000, body_timeout_s=0.2)
    app = web.Application()
    app.router.add_post("/", handler)
    async with TestClient(TestServer(app)) as client:
        yield client


async def test_an_object_is_read(client):
    answer = await client.post("/", data=b'{"a": 1}')
    assert await answer.json() == {"a": 1}


@pytest.mark.parametrize("body", [b"[]", b"1", b"null", b'"a"'])
async def test_anything_but_an_object_is_refused(body, client):
    assert (await client.post("/", data=body)).status == 400


async def test_a_body_is_refused_for_its_length_as_it_is_told(client):
    assert (await client.post("/", data=b" " * 1001)).status == 413


async def test_a_body_is_refused_for_its_length_as_it_comes(client):
    async def pieces():
        for _ in range(100):
            yield b" " * 50

    assert (await client.post("/", data=pieces())).status == 413


async def test_a_body_that_trickles_is_given_up(client):
    async def pieces():
        for _ in range(100):
            yield b" "
            await asyncio.sleep(0.05)

    assert (await client.post("/", data=pieces())).status == 408


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "nonsense"])
async def test_a_compressed_body_is_refused(encoding, client):
    answer = await client.post("/", data=b"{}", headers={"Content-Encoding": encoding}, skip_auto_headers=["Expect"])
    assert answer.status in (400, 415)
