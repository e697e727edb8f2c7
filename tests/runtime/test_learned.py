"""What an engine learned, in a file: written when it closes, read by the next one, refused when damaged."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from treadle.runtime import EngineConfig, SamplingParams, local
from treadle.runtime.errors import EngineClosedError, InvalidRequestError

TINY = "random:tiny-llama"
CONFIG = EngineConfig(dtype="float32", num_pages=256, page_size=4)
NOTHING = {"version": 1, "all": [], "names": []}
EMPTY = {"pauses": NOTHING, "outputs": NOTHING, "durations": NOTHING}


async def run(path, *lengths):
    """An engine that keeps what it learns at `path` generates outputs of these lengths. Returns what it expected."""
    async with local(TINY, replace(CONFIG, learned=path)) as runtime:
        expected = runtime._engine._engine.scheduler.books.outputs.of(("generate", "")).remaining(0)
        for length in lengths:
            await runtime.generate([1, 2, 3], SamplingParams(temperature=0.0), max_tokens=length)
    return expected


async def test_the_next_engine_expects_what_the_last_one_saw(tmp_path):
    path = tmp_path / "learned.json"
    assert await run(path, *[9] * 10) == 0
    assert await run(path, *[3] * 5) == 9
    assert await run(str(path)) == 7
    assert [file.name for file in tmp_path.iterdir()] == ["learned.json"]


async def test_without_a_file_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    await run(None, 9)
    assert list(tmp_path.iterdir()) == []


async def test_a_scope_that_fails_or_is_cancelled_keeps_what_it_learned(tmp_path):
    async def fail(path, error):
        async with local(TINY, replace(CONFIG, learned=path)) as runtime:
            await runtime.generate([1, 2, 3], max_tokens=5)
            raise error

    for path, error in ((tmp_path / "one", ZeroDivisionError()), (tmp_path / "two", asyncio.CancelledError())):
        with pytest.raises(type(error)):
            await fail(path, error)
        assert await run(path) == 5


async def test_an_engine_that_dies_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "learned.json"
    await run(path, 5)
    before = path.read_bytes()
    async with local(TINY, replace(CONFIG, learned=path)) as runtime:
        await runtime.generate([1, 2, 3], max_tokens=9)

        def die(now):
            raise MemoryError("out of memory, for the test")

        runtime._engine._engine.scheduler.plan = die
        with pytest.raises(EngineClosedError):
            await runtime.generate([1, 2, 3], max_tokens=9)
    assert path.read_bytes() == before


async def test_of_two_engines_the_last_to_close_wins(tmp_path):
    path = tmp_path / "learned.json"
    async with local(TINY, replace(CONFIG, learned=path)) as runtime:
        await runtime.generate([1, 2, 3], max_tokens=5)
        await run(path, 9)
        assert await run(path) == 9
    assert await run(path) == 5


async def test_the_file_is_the_one_that_was_meant_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("target")
    monkeypatch.chdir(tmp_path)
    async with local(TINY, replace(CONFIG, learned="link")) as runtime:
        await runtime.generate([1, 2, 3], max_tokens=5)
        monkeypatch.chdir("elsewhere")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").is_file()
    assert await run(tmp_path / "link") == 5


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        json.dumps({"pauses": NOTHING}).encode(),
        json.dumps({**EMPTY, "outputs": {**NOTHING, "version": 2}}).encode(),
        json.dumps({**EMPTY, "outputs": {**NOTHING, "all": [[0, float("nan"), 1]]}}).encode(),
    ],
    ids=["empty", "no text", "deep", "a list", "half", "version 2", "not a number"],
)
async def test_a_damaged_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "learned.json"
    path.write_bytes(content)
    with pytest.raises(InvalidRequestError, match=r"learned\.json: .*delete the file to begin anew"):
        await run(path)
    assert path.read_bytes() == content


async def test_a_file_that_was_cut_off_is_refused(tmp_path):
    path = tmp_path / "learned.json"
    await run(path, 5)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InvalidRequestError, match="delete the file"):
        await run(path)


@pytest.mark.parametrize("place", [".", "no such folder/learned.json", "file/learned.json", "/proc/learned.json"])
async def test_a_place_that_cannot_be_written_to_is_refused_at_the_start(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequestError, match="in a folder that can be written to"):
        await run(tmp_path / place)


async def test_a_place_that_is_lost_meanwhile_is_a_warning_at_the_end(tmp_path, recwarn):
    folder = tmp_path / "folder"
    folder.mkdir()
    async with local(TINY, replace(CONFIG, learned=folder / "learned.json")):
        folder.rmdir()
    assert "could not be kept: No such file or directory" in str(recwarn.pop(RuntimeWarning).message)
