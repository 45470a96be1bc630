"""One operation at a time for each slot, which is seen through whatever becomes of its caller."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hotlun.errors import OutcomeUnknownError
from hotlun.hcs.system import StillRunningError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hotlun.backends.errand import Errand
    from hotlun.model import Slot

    Ended = Callable[[BaseException | None], None]
    """Is told how an operation has really ended."""


class Unfinished:
    """What has been begun and has not ended, by slot.

    Args:
        timeout: seconds that a later operation waits for an earlier one.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._running: dict[Slot, asyncio.Future[None]] = {}

    def __contains__(self, slot: Slot) -> bool:
        return slot in self._running

    async def run(
        self,
        errand: Errand,
        slot: Slot,
        begin: Callable[[], Awaitable[None]],
        ended: Ended = lambda _: None,
    ) -> None:
        """See an operation through, once what was begun at this slot before has ended.

        Args:
            errand: what it is about.
            slot: where.
            begin: begins it, unless nothing is left to do by then.
            ended: is called once with its error or None, before the caller goes on, and late
                for one that goes on when its caller has been told that it is unknown.

        Raises:
            OutcomeUnknownError: an earlier one goes on still; this one was not begun.
            BaseException: what the operation raises.
        """
        await self._wait(errand, slot)
        running: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running[slot] = running

        def is_over(error: BaseException | None) -> None:
            if self._running.get(slot) is running:
                del self._running[slot]
            ended(error)
            if not running.done():
                running.set_result(None)

        def has_returned(task: asyncio.Task[None]) -> None:
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            if isinstance(error, StillRunningError):
                error.outcome.add_done_callback(lambda late: is_over(late.result()))
            else:
                is_over(error)

        async def operation() -> None:
            await begin()

        task = asyncio.create_task(operation(), name=f"hotlun {errand}")
        task.add_done_callback(has_returned)
        await asyncio.shield(task)

    async def _wait(self, errand: Errand, slot: Slot) -> None:
        deadline = asyncio.get_running_loop().time() + self._timeout
        while (earlier := self._running.get(slot)) is not None:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                raise errand.error(
                    OutcomeUnknownError,
                    f"what was begun at slot {slot} before goes on after {self._timeout:g} s, so "
                    "this was not begun; wait for it, or end the VM",
                )
            await asyncio.wait((earlier,), timeout=left)
