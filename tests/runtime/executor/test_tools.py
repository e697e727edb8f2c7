"""Tools: what they may do wrong, how they run, and conversations that call them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel

from treadle.dsl import Chat, gather, llm, program, prompt, tool
from treadle.dsl.errors import NodeFailed, ToolArgumentsError, ToolError, ToolTimeout

CIRCLE: list[object] = []
CIRCLE.append(CIRCLE)


class Verdict(BaseModel):
    answer: Literal["yes", "no"]


@llm(max_tokens=5)
async def comment(text: str) -> str:
    return prompt(f"Comment on {text}")


async def test_a_sync_tool_runs_in_a_thread_and_an_async_one_on_the_loop(fast_runtime):
    @tool
    def sync_tool() -> str:
        return threading.current_thread().name

    @tool
    async def async_tool() -> str:
        return threading.current_thread().name

    async with fast_runtime(), program("threads"):
        names = await gather(sync_tool(), async_tool())
    assert names[0] != names[1] == threading.current_thread().name


async def test_tools_run_side_by_side_up_to_their_limit(fast_runtime):
    running, most = 0, 0

    @tool(concurrency=2)
    async def limited(index: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return index

    async with fast_runtime(), program("limited"):
        assert await gather(*(limited(i) for i in range(6))) == (0, 1, 2, 3, 4, 5)
    assert most == 2


async def test_a_tool_that_raises_is_a_tool_error_with_its_cause_and_the_path(fast_runtime):
    @tool
    def failing() -> str:
        raise ZeroDivisionError("on purpose")

    async with fast_runtime(), program("failing"):
        bad = failing()
        after = comment(bad)
        with pytest.raises(ToolError, match="failing failed: ZeroDivisionError: on purpose"):
            await bad
        with pytest.raises(NodeFailed, match=r"comment.*\n.*needs failing"):
            await after
        assert isinstance(await comment("beside"), str)


async def test_a_tool_that_hangs_is_given_up_after_its_timeout(fast_runtime):
    release = threading.Event()

    @tool(timeout=0.05)
    def hanging() -> str:
        release.wait(20)
        return "too late"

    @tool(timeout=0.05)
    async def hanging_async() -> str:
        await asyncio.sleep(60)
        return "too late"

    started = time.monotonic()
    async with fast_runtime(), program("hanging"):
        for call in (hanging(), hanging_async()):
            with pytest.raises(ToolTimeout, match=r"longer than its 0\.05 s"):
                await call
    assert time.monotonic() - started < 10
    release.set()


async def test_a_tool_that_hangs_for_ever_does_not_hold_up_the_end_of_the_process(tmp_path):
    script = tmp_path / "hang.py"
    script.write_text(
        "import threading\n"
        "from treadle.dsl import program, tool\n"
        "from treadle.dsl.errors import ToolTimeout\n"
        "@tool(timeout=0.1)\n"
        "def hang() -> str:\n"
        "    threading.Event().wait()\n"
        "    return ''\n"
        "async def main() -> str:\n"
        "    async with program('hang'):\n"
        "        try:\n"
        "            return await hang()\n"
        "        except ToolTimeout:\n"
        "            return 'given up'\n"
    )
    command = [Path(sys.executable).parent / "treadle", "run", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("given up")


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("x" * 10_000_000, "returned 10,000,000 bytes; return at most"),
        ({1: object()}, "returned a dict that cannot be written as JSON .*; return text, numbers"),
        (CIRCLE, "returned a list that cannot be written as JSON"),
        ("\ud800", "returned a str that cannot be written as JSON"),
        (float("nan"), None),
    ],
    ids=["large", "object", "circle", "surrogate", "nan"],
)
async def test_a_result_that_cannot_be_in_a_prompt_is_refused_and_odd_ones_do_no_harm(fast_runtime, result, text):
    @tool
    def returning() -> object:
        return result

    async with fast_runtime(), program("returning"):
        call = returning()
        if text is not None:
            with pytest.raises(ToolError, match=text):
                await call
        assert isinstance(await comment("beside"), str)


async def test_wrong_arguments_name_the_parameter(fast_runtime):
    @tool
    def typed(count: int) -> int:
        return count

    async with fast_runtime(), program("typed"):
        with pytest.raises(ToolArgumentsError, match="count"):
            await typed("many")


async def test_a_tool_is_retried_as_often_as_it_says(fast_runtime):
    attempts = []

    @tool(retries=2, effects="idempotent")
    def flaky() -> str:
        attempts.append(1)
        if len(attempts) < 3:
            raise ConnectionError("not yet")
        return "there"

    async with fast_runtime(), program("flaky"):
        assert await flaky() == "there"


async def test_cancelling_a_program_cancels_its_tools(fast_runtime):
    cancelled = asyncio.Event()

    @tool
    async def sleeping() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return ""

    async with fast_runtime():
        async with program("cancelled"):
            sleeping()
            await asyncio.sleep(0.05)
        assert cancelled.is_set()


@tool(effects="read")
def flip(side: Literal["a", "b"]) -> str:
    """Flips a coin.

    Args:
        side: The side that is up.
    """
    return "b" if side == "a" else "a"


async def turn_with_calls(runtime, at_least):
    """A turn of the random model with several tool calls: seeds are tried until it makes them."""
    for seed in range(200):
        async with program("turn") as scope:
            chat = Chat("Flip.", tools=[flip], returns=Verdict, temperature=1.0, seed=seed, max_tokens=400)
            try:
                answer = await chat.ask("Flip coins.", max_steps=3)
            except Exception as error:
                answer = error
        turns = [node for node in scope.graph.nodes() if node.name == "chat"]
        if len(turns) > 1 and len(turns[0].calls) >= at_least:
            return scope, turns, answer
    raise AssertionError("no seed makes the model call the tool")


async def test_the_first_tool_starts_before_its_turn_ends_and_the_next_turn_prefills_only_what_is_new(fast_runtime):
    async with fast_runtime() as runtime:
        scope, turns, _ = await turn_with_calls(runtime, at_least=2)
        tools = [node for node in scope.graph.nodes() if node.kind == "tool"]
        assert tools[0].started_at < turns[0].finished_at
        assert scope.account.first_tool_lead_s > 0
        assert all(node.output.value in ("a", "b") for node in tools if node.caller is turns[0])
        assert turns[1].extends is turns[0]
        decisions = list(runtime._engine._engine.scheduler.decisions)
    second = f"{scope.id}/{turns[1].id}/0"
    admitted = next(d for d in decisions if d.subject == second and d.action == "admit")
    known, _ = (int(n) for n in admitted.reason.split(", ")[1].split()[0].split("/"))
    first_prompt = next(d for d in decisions if d.subject == f"{scope.id}/{turns[0].id}/0" and d.action == "admit")
    first_length = int(first_prompt.reason.split(", ")[1].split()[0].split("/")[1])
    generated = len(turns[0].output.token_ids)
    assert known >= first_length + generated - 1, "all but the last generated token was computed in the turn before"


async def test_a_workflow_without_a_program_has_an_account_too(tmp_path):
    script = tmp_path / "single.py"
    script.write_text(
        "from treadle.dsl import llm, prompt\n"
        "@llm(max_tokens=5)\n"
        "async def greet(name: str) -> str:\n"
        "    return prompt(f'Greet {name}.')\n"
        "async def main(name: str = 'Ada') -> str:\n"
        "    return await greet(name)\n"
    )
    command = [Path(sys.executable).parent / "treadle", "run", str(script), "Bob", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    (account,) = [entry["account"] for entry in json.loads(done.stdout)["programs"]]
    assert account["calls"] == 1
