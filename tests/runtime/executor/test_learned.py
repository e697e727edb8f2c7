"""How long tools take is known in the next run too."""

from __future__ import annotations

import asyncio

from treadle.dsl import llm, program, prompt, tool

RULES = "Answer in a few words, and say nothing that the record does not say. " * 4
"""Enough tokens to be computed, and held by a lease, while the tool runs."""


@tool
async def look_up(number: int) -> str:
    await asyncio.sleep(0.05)
    return f"record {number}"


@tool
async def measure(number: int) -> str:
    await asyncio.sleep(1.0)
    return f"value {number}"


@llm(max_tokens=2)
async def answer(rules: str, record: str) -> str:
    return prompt(f"{rules}{record}")


async def agent(source, number):
    async with program("agent"):
        return await answer(f"{number}. {RULES}", source(number))


async def test_each_tool_is_expected_to_take_its_time_from_the_first_call_on(fast_runtime, tmp_path):
    path = tmp_path / "learned.json"
    async with fast_runtime(learned=path):
        for source in (look_up, measure):
            await asyncio.gather(*(agent(source, number) for number in range(10)))

    async with fast_runtime(learned=path) as runtime:
        books = runtime._engine._engine.scheduler.books
        waiting = asyncio.create_task(agent(measure, 0))
        while not (leases := [lease for lease in books.leases.values() if lease.pause == ("agent", "measure")]):
            await asyncio.sleep(0.01)
        expected = books.expected_pause(leases[0], leases[0].since)
        assert expected > 0.7
        assert books.pauses.of(("agent", "look_up")).mean() < 0.7 * expected
        await waiting
