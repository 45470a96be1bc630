"""A request that takes longer than anybody waits for it."""

from __future__ import annotations

import asyncio


class Late:
    """A request that takes its time.

    Args:
        is_done_first: whether it is carried out at once, so that only the answer is late.
        times_out: whether who waits is told that its time is over.
    """

    def __init__(self, *, is_done_first: bool, times_out: bool) -> None:
        self.is_done_first = is_done_first
        self.times_out = times_out
        self.begun = asyncio.Event()
        self.done = asyncio.Event()
        """It has been carried out, and not been answered yet."""
        self.ended = asyncio.Event()
        self._go = asyncio.Event()

    def settle(self) -> None:
        """Go on now."""
        self._go.set()

    async def wait(self) -> None:
        await self._go.wait()
