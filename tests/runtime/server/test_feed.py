"""The feed of events: in order, from where a reader left off, never another tenant's, and honest about gaps."""

from __future__ import annotations

import asyncio

from treadle.runtime.server.feed import Feed


async def take(feed, count, tenant="", last_id=None):
    events = []
    reader = feed.read(tenant, last_id)
    async with asyncio.timeout(5):
        async for event in reader:
            events.append(event)
            if len(events) == count:
                break
    await reader.aclose()
    return events


def numbers(events):
    return [event.data["n"] for event in events]


def publish(feed, *values, tenant=""):
    for value in values:
        feed.publish(tenant, "count", {"n": value})


async def test_a_reader_sees_what_happens_from_now_on():
    feed = Feed()
    publish(feed, 0)
    reading = asyncio.create_task(take(feed, 2))
    await asyncio.sleep(0)
    publish(feed, 1, 2)
    events = await reading
    assert numbers(events) == [1, 2]
    assert events[0].data["time"] > 1.7e9


async def test_a_reader_that_comes_back_goes_on_after_the_event_that_it_saw_last():
    feed = Feed()
    reading = asyncio.create_task(take(feed, 1))
    await asyncio.sleep(0)
    publish(feed, *range(5))
    (first,) = await reading
    assert numbers(await take(feed, 4, last_id=first.id)) == [1, 2, 3, 4]


async def test_a_reader_that_was_away_for_too_long_is_told_how_much_it_missed():
    feed = Feed(max_events=4)
    publish(feed, 0)
    seen = await take(feed, 1, last_id=f"{feed._run}-0")
    publish(feed, *range(1, 11))
    gap, *rest = await take(feed, 5, last_id=seen[0].id)
    assert (gap.kind, gap.data) == ("gap", {"missed": 6})
    assert numbers(rest) == [7, 8, 9, 10]
    assert numbers(await take(feed, 4, last_id=gap.id)) == [7, 8, 9, 10], "one can come back to a gap"


async def test_a_place_in_another_servers_feed_is_a_gap_of_unknown_length():
    feed = Feed()
    publish(feed, 1)
    for strange in ("dead-1", "x", "", "-", f"{feed._run}-99"):
        gap, event = await take(feed, 2, last_id=strange)
        assert (gap.kind, gap.data, event.data["n"]) == ("gap", {"missed": None}, 1)


async def test_a_slow_reader_is_told_of_the_gap_that_grew_meanwhile():
    feed = Feed(max_events=3)
    reader = feed.read("")
    reading = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    publish(feed, 0)
    assert (await reading).data["n"] == 0
    publish(feed, *range(1, 9))
    kinds = [(event.kind, event.data.get("n")) for event in [await anext(reader) for _ in range(4)]]
    assert kinds == [("gap", None), ("count", 6), ("count", 7), ("count", 8)]
    await reader.aclose()


async def test_tenants_see_nothing_of_each_other():
    feed = Feed()
    publish(feed, 1, tenant="a")
    publish(feed, 2, 3, tenant="b")
    first = (await take(feed, 1, "a", "none"))[0]
    assert first.kind == "gap"
    assert numbers(await take(feed, 1, "a", first.id)) == [1]
    assert numbers((await take(feed, 3, "b", "none"))[1:]) == [2, 3]
