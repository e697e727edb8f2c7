"""An event loop that ends with a runtime and programs still open ends all the same, and so does the engine."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

import pytest

from treadle.dsl import llm, program, prompt, tool


@llm(max_tokens=1500)
async def story(topic: str) -> str:
    return prompt(f"Write about {topic}.")


@tool
async def endless() -> str:
    await asyncio.sleep(600)
    return ""


def run_beside(workflow):
    """Runs a workflow on a loop of its own, in a thread that a loop that never ends does not hold up."""
    outcome: Future[object] = Future()

    def run():
        try:
            outcome.set_result(asyncio.run(workflow()))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result(timeout=60)


async def scoped(keep):
    keep.append(program("left open"))
    await keep[-1].__aenter__()
    keep += [story("looms"), endless()]


async def nested(keep):
    await scoped(keep)
    await scoped(keep)


async def implicit(keep):
    keep += [story("looms"), endless()]


async def closing(keep):
    """Somebody is in the middle of closing the program when the loop ends."""
    await scoped(keep)
    keep.append(asyncio.create_task(keep[0].__aexit__(None, None, None)))
    await asyncio.sleep(0)


async def closed(keep):
    async with program("closed"):
        keep.append(story("looms"))


@pytest.mark.parametrize("begin", [scoped, nested, implicit, closing, closed])
@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_a_loop_ends_though_a_runtime_was_left_open(fast_runtime, capfd, begin, pause):
    keep = []

    async def workflow():
        keep.insert(0, fast_runtime())
        await keep[0].__aenter__()
        rest = []
        await begin(rest)
        keep.append(rest)
        await asyncio.sleep(pause)
        raise LookupError("half-way")

    with pytest.raises(LookupError, match="half-way"):
        run_beside(workflow)
    assert [thread.name for thread in threading.enumerate() if thread.name == "treadle-engine"] == []
    assert "Traceback" not in capfd.readouterr().err


async def test_closing_a_program_twice_at_once_waits_for_its_end_both_times(fast_runtime):
    async with fast_runtime() as runtime, program("closing") as scope:
        story("looms")
        await asyncio.sleep(0.02)
        ends = [asyncio.create_task(scope.close()) for _ in range(3)]
        await asyncio.gather(*ends)
        assert scope.account is not None and runtime._executor._open == {}
