"""What a Manager's `events()` tells, waited for one by one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotlun import Manager
    from hotlun.events import Event

    E = TypeVar("E", bound=Event)

DEADLINE = 60.0
"""Seconds for each event."""


class News:
    """Hears everything from now on, and keeps it."""

    def __init__(self, manager: Manager) -> None:
        self._stream = manager.events()
        self.heard: list[Event] = []

    @property
    def kinds(self) -> list[type[Event]]:
        """Of what was heard."""
        return [type(event) for event in self.heard]

    async def next(self) -> Event:
        """The next event."""
        async with asyncio.timeout(DEADLINE):
            event = await anext(self._stream)
        self.heard.append(event)
        return event

    async def until(self, kind: type[E], fits: Callable[[E], bool] = lambda _: True) -> E:
        """The next event of this kind that fits; those before it are in `heard`."""
        async with asyncio.timeout(DEADLINE):
            while True:
                event = await self.next()
                if isinstance(event, kind) and fits(event):
                    return event
