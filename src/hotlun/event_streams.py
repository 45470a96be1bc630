"""Events for whoever iterates: each gets all of them, from when it has asked on."""

from __future__ import annotations

import asyncio
import collections
import weakref
from typing import TYPE_CHECKING, Self

from hotlun.events import Event, EventsMissed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_KEPT = 1024
"""Events that wait for a slow listener; older ones are dropped, and it is told how many."""


class EventStream:
    """An iterator over events; it ends when there can be no more of them."""

    def __init__(self) -> None:
        self._waiting: collections.deque[Event] = collections.deque()
        self._missed = 0
        self._has_ended = False
        self._news = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._waiting:
            if self._has_ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        if self._missed:
            missed, self._missed = self._missed, 0
            return EventsMissed(missed)
        return self._waiting.popleft()

    async def aclose(self) -> None:
        """Hear no more."""
        self._waiting.clear()
        self.end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def put(self, event: Event) -> None:
        """One more, for the next turn of who iterates."""
        if self._has_ended:
            return
        if len(self._waiting) == _KEPT:
            self._waiting.popleft()
            self._missed += 1
        self._waiting.append(event)
        self._news.set()

    def end(self) -> None:
        """There are no more than those that wait."""
        self._has_ended = True
        self._news.set()


class EventStreams:
    """All who listen. One that nobody holds any more is not kept for itself."""

    def __init__(self) -> None:
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._have_ended = False

    def open(self) -> EventStream:
        """A stream of what happens from now on."""
        stream = EventStream()
        if self._have_ended:
            stream.end()
        else:
            self._streams.add(stream)
        return stream

    def tell(self, event: Event) -> None:
        """Tell everybody who listens."""
        for stream in list(self._streams):
            stream.put(event)

    def end(self) -> None:
        """Nothing happens any more."""
        self._have_ended = True
        for stream in list(self._streams):
            stream.end()
