"""News of a device that leaves the VM reaches those who wait for that device, and nobody else."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from hotlun.backends.departures import Departures

if TYPE_CHECKING:
    import asyncio


class Counted(dict[str, object]):
    """An event of QEMU's that counts how often it is looked into."""

    def __init__(self, name: str, **data: object) -> None:
        super().__init__(event=name, data=data)
        self.looks = 0

    def get(self, key: str, default: object = None) -> object:
        self.looks += 1
        return super().get(key, default)

    def __getitem__(self, key: str) -> object:
        self.looks += 1
        return super().__getitem__(key)


async def test_news_reaches_everybody_who_waits_for_that_device() -> None:
    """The first of it; what comes later, and what is of another device, changes nothing."""
    departures = Departures()
    with departures.of("a") as one, departures.of("a") as two, departures.of("b") as other:
        departures.hear({"event": "DEVICE_UNPLUG_GUEST_ERROR", "data": {"device": "a"}})
        departures.hear({"event": "DEVICE_DELETED", "data": {"device": "a"}})
        assert await one == await two == "DEVICE_UNPLUG_GUEST_ERROR"
        assert not other.done()


@pytest.mark.parametrize(
    "event",
    [
        {"event": "RESUME"},
        {"event": "DEVICE_DELETED", "data": {"path": "/machine/peripheral-anon"}},
        {"event": "DEVICE_DELETED", "data": {"device": ["a"]}},
        {"event": "DEVICE_DELETED", "data": "a"},
        {"event": "BLOCK_IO_ERROR", "data": {"device": "a"}},
    ],
)
async def test_other_events_are_no_news_of_it(event: dict[str, object]) -> None:
    """Nor is a removal of what has no id, or an event of another shape."""
    departures = Departures()
    with departures.of("a") as departure:
        departures.hear(event)
        assert not departure.done()


async def test_who_waits_no_more_is_told_nothing() -> None:
    """Whether it was cancelled while it waited, or had its answer otherwise."""
    departures = Departures()
    with departures.of("a") as departure:
        departure.cancel()
        departures.hear({"event": "DEVICE_DELETED", "data": {"device": "a"}})
    assert departure.cancelled()
    with departures.of("a") as left:
        pass
    departures.hear({"event": "DEVICE_DELETED", "data": {"device": "a"}})
    assert not left.done()


@pytest.mark.parametrize("others", [0, 255])
async def test_an_event_is_looked_at_once_however_many_devices_leave(others: int) -> None:
    """As often for the only one as for one of 256."""
    departures = Departures()
    with ExitStack() as stack:
        for number in range(others):
            stack.enter_context(departures.of(f"other {number}"))
        departure: asyncio.Future[str] = stack.enter_context(departures.of("a"))
        event = Counted("DEVICE_DELETED", device="a")
        departures.hear(event)
        assert departure.done()
        assert event.looks == 3
