"""Events reach everybody who listens, in order, and cost nothing where nobody does."""

from __future__ import annotations

import asyncio
import gc

import pytest

from hotlun.event_streams import EventStream, EventStreams
from hotlun.events import Event, EventsMissed, VMGone, VMPaused, VMResumed


async def heard(stream: EventStream, count: int) -> list[Event]:
    return [await anext(stream) for _ in range(count)]


async def test_everybody_hears_everything() -> None:
    """From the moment of asking, not from that of the first turn; then the stream ends."""
    streams = EventStreams()
    streams.tell(VMPaused("before anybody asked"))
    one, other = streams.open(), streams.open()
    streams.tell(VMPaused())
    assert await heard(one, 1) == [VMPaused()]
    streams.tell(VMResumed())
    streams.end()
    assert [event async for event in one] == [VMResumed()]
    assert [event async for event in other] == [VMPaused(), VMResumed()]
    assert [event async for event in streams.open()] == []


async def test_who_waits_is_woken() -> None:
    """By an event, and by the end."""
    streams = EventStreams()
    stream = streams.open()
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    streams.tell(VMGone("killed"))
    assert await waiting == VMGone("killed")
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    streams.end()
    with pytest.raises(StopAsyncIteration):
        await waiting


async def test_who_is_slow_is_told_so() -> None:
    """The oldest are dropped, and counted."""
    streams = EventStreams()
    stream = streams.open()
    for number in range(1030):
        streams.tell(VMPaused(str(number)))
    assert await heard(stream, 2) == [EventsMissed(6), VMPaused("6")]
    assert len(await heard(stream, 1023)) == 1023


async def test_who_has_gone_is_not_kept() -> None:
    """Neither one that was closed nor one that nobody has any more."""
    streams = EventStreams()
    async with streams.open() as closed:
        pass
    streams.tell(VMResumed())
    assert [event async for event in closed] == []
    streams.open()
    gc.collect()
    assert list(streams._streams) == [closed]
