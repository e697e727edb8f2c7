"""The runtime as a program uses it: many calls at once, streams, cancellation, and clean ends."""

from __future__ import annotations

import asyncio
import threading

import pytest

from treadle.runtime import Chunk, Completion, EngineConfig, SamplingParams, local
from treadle.runtime.errors import CallError, EngineClosedError, InvalidRequestError, ModelNotFoundError
from treadle.scheduler.simulator.traces import read

TINY = "random:tiny-llama"
CONFIG = EngineConfig(dtype="float32", num_pages=256, page_size=4)
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
async def runtime():
    async with local(TINY, CONFIG) as runtime:
        yield runtime


@pytest.fixture
def left():
    """Threads of ours that were begun since the test was: a server of other tests may have some."""
    before = set(threading.enumerate())

    def names():
        return [t.name for t in threading.enumerate() if t not in before and t.name.startswith("treadle")]

    return names


async def idle(runtime):
    """Waits until the engine has taken all commands and has nothing left to do."""
    scheduler = runtime._engine._engine.scheduler
    for _ in range(400):
        if not scheduler.num_running and not scheduler.num_waiting and not scheduler._calls:
            return scheduler
        await asyncio.sleep(0.01)
    raise AssertionError("the engine does not come to rest")


async def test_many_calls_at_once_share_the_engine(runtime):
    prompts = [[index, 2, 3] for index in range(20)]
    alone = [await runtime.generate(prompt, GREEDY, max_tokens=8) for prompt in prompts]
    together = await asyncio.gather(*(runtime.generate(prompt, GREEDY, max_tokens=8) for prompt in prompts))
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert sum(c.usage.steps for c in together) > 0
    assert all(c.finish_reason == "length" for c in together)


async def test_a_stream_gives_every_token_and_then_the_whole(runtime):
    whole = await runtime.generate([1, 2, 3], GREEDY, max_tokens=10)
    parts = [part async for part in runtime.stream([1, 2, 3], GREEDY, max_tokens=10)]
    *chunks, last = parts
    assert isinstance(last, Completion)
    assert all(isinstance(chunk, Chunk) for chunk in chunks)
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == last.token_ids == whole.token_ids


async def test_n_completions_compute_the_prompt_once(runtime):
    many = await runtime.generate_many(list(range(60)), SamplingParams(seed=7), max_tokens=6, n=4)
    assert [c.usage.prefilled for c in many] == [60, 1, 1, 1]
    assert len({c.token_ids for c in many}) > 1
    single = await runtime.generate(list(range(60)), SamplingParams(seed=9), max_tokens=6)
    assert single.token_ids == many[2].token_ids, "seed + 2"


async def test_cancelling_a_task_aborts_its_call(runtime):
    task = asyncio.create_task(runtime.generate([1, 2], GREEDY, max_tokens=900))
    other = asyncio.create_task(runtime.generate([3, 4], GREEDY, max_tokens=20))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len((await other).token_ids) == 20
    scheduler = await idle(runtime)
    assert any(d.action == "finish" and d.reason == "aborted" for d in scheduler.decisions)
    scheduler.check_integrity()


async def test_leaving_a_stream_aborts_its_call(runtime):
    stream = runtime.stream([1, 2], GREEDY, max_tokens=900)
    async for _ in stream:
        break
    await stream.aclose()
    await idle(runtime)


@pytest.mark.parametrize(
    ("prompt", "params", "max_tokens", "text"),
    [
        ([], GREEDY, 1, "no tokens"),
        ([1], GREEDY, 0, "at least 1"),
        ([1], GREEDY, 10**9, "at most"),
        ([1] * 5000, GREEDY, None, "shorten"),
        ([1], SamplingParams(temperature=float("nan")), 1, "temperature"),
        ("text", GREEDY, 1, "no tokenizer"),
        ([{"role": "user", "content": "text"}], GREEDY, 1, "no tokenizer"),
    ],
)
async def test_bad_requests_raise_and_the_next_one_works(runtime, prompt, params, max_tokens, text):
    with pytest.raises(InvalidRequestError, match=text):
        await runtime.generate(prompt, params, max_tokens=max_tokens)
    assert len((await runtime.generate([1], GREEDY, max_tokens=3)).token_ids) == 3


@pytest.mark.parametrize(
    ("n", "text"), [(0, "n is 0"), (10**12, "n is 1000000000000; the engine holds at most 8192 calls: ask for fewer")]
)
async def test_a_number_of_completions_that_cannot_be_is_refused_at_once(runtime, n, text):
    with pytest.raises(InvalidRequestError, match=text):
        await runtime.generate_many([1], GREEDY, n=n)
    assert len(await runtime.generate_many([1], GREEDY, max_tokens=1, n=3)) == 3


async def test_a_call_that_fails_while_it_runs_raises_call_error(runtime):
    decoder = runtime._engine._engine.runner.decoder
    forward = decoder.forward

    def explode(token_ids, attention, wanted):
        if bool((token_ids == 499).any()):
            raise RuntimeError("made to fail")
        return forward(token_ids, attention, wanted)

    decoder.forward = explode
    good, bad = await asyncio.gather(
        runtime.generate([1, 2], GREEDY, max_tokens=10),
        runtime.generate([499], GREEDY, max_tokens=10),
        return_exceptions=True,
    )
    assert len(good.token_ids) == 10
    assert isinstance(bad, CallError)
    assert "made to fail" in str(bad)


async def test_leaving_the_scope_ends_the_thread_and_the_calls(left):
    async with local(TINY, CONFIG) as runtime:
        task = asyncio.create_task(runtime.generate([1, 2], GREEDY, max_tokens=900))
        await asyncio.sleep(0.05)
    with pytest.raises(EngineClosedError):
        await task
    with pytest.raises(EngineClosedError):
        await runtime.generate([1], GREEDY, max_tokens=1)
    assert left() == []


async def test_an_engine_that_dies_fails_its_calls_and_says_so(left):
    async with local(TINY, CONFIG) as runtime:
        task = asyncio.create_task(runtime.generate([1, 2], GREEDY, max_tokens=900))
        await asyncio.sleep(0.05)

        def die(now):
            raise MemoryError("out of memory, for the test")

        runtime._engine._engine.scheduler.plan = die
        with pytest.raises(EngineClosedError):
            await task
        with pytest.raises(EngineClosedError):
            await runtime.generate([1], GREEDY, max_tokens=1)
    assert left() == []


async def test_a_load_that_is_cancelled_leaves_no_engine_and_the_next_one_works(left):
    async def use():
        async with local(TINY, CONFIG) as runtime:
            return len((await runtime.generate([1], GREEDY, max_tokens=3)).token_ids)

    for pause in (0.0, 0.002, 0.01, 0.05):
        task = asyncio.create_task(use())
        await asyncio.sleep(pause)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert left() == []
    assert await use() == 3


async def test_what_ran_is_recorded_where_it_was_asked_for(tmp_path):
    path = tmp_path / "trace.jsonl"
    async with local(TINY, CONFIG, record=path) as runtime:
        await runtime.generate(range(20), GREEDY, max_tokens=3)
    (recorded,) = read(path).programs
    assert [(call.prompt_tokens, call.output_tokens) for call in recorded.calls] == [(20, 3)]


async def test_a_recording_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path):
    with pytest.raises(InvalidRequestError, match="programs cannot be recorded here"):
        async with local("/no/such/model.gguf", record=tmp_path / "nowhere" / "trace.jsonl"):
            pass


async def test_a_model_that_is_not_there_raises():
    with pytest.raises(ModelNotFoundError, match="no shape is called"):
        async with local("random:tiny-lama"):
            pass
    with pytest.raises(ModelNotFoundError):
        async with local("/no/such/model.gguf"):
            pass
