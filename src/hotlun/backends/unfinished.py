"""One operation at a time in each place, which is seen through whatever becomes of its caller."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hotlun.errors import OutcomeUnknownError
from hotlun.hcs.system import StillRunningError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

    Ended = Callable[[BaseException | None], None]
    """Is told how an operation has really ended."""

PATIENCE = 15.0
"""Seconds to wait for what was begun before, and has had its own time already."""


class Unfinished:
    """What has been begun and has not ended, by place: a slot, or a file that access is given to.

    Args:
        timeout: seconds that a later operation waits for an earlier one.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._running: dict[Hashable, asyncio.Future[None]] = {}

    def __contains__(self, place: Hashable) -> bool:
        return place in self._running

    async def run(
        self,
        place: Hashable,
        begin: Callable[[], Awaitable[None]],
        ended: Ended = lambda _: None,
    ) -> None:
        """See an operation through, once what was begun there before has ended.

        Args:
            place: where.
            begin: begins it, unless nothing is left to do by then.
            ended: is called once with its error or None, before the caller goes on, and late
                for one that goes on when its caller has been told that it is unknown. Never
                for one whose own task is cancelled: how that ends nobody is told, and its
                place stays taken.

        Raises:
            OutcomeUnknownError: an earlier one goes on still; this one was not begun.
            BaseException: what the operation raises.
        """
        await self._wait(place)
        running: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running[place] = running

        def is_over(error: BaseException | None) -> None:
            if self._running.get(place) is running:
                del self._running[place]
            ended(error)
            if not running.done():
                running.set_result(None)

        def has_returned(task: asyncio.Task[None]) -> None:
            if task.cancelled():  # all tasks are, when asyncio.run() ends; what was begun goes on
                if not is_begun:
                    is_over(asyncio.CancelledError())
                return
            error = task.exception()
            if isinstance(error, StillRunningError):
                error.outcome.add_done_callback(lambda late: is_over(late.result()))
            else:
                is_over(error)

        is_begun = False

        async def operation() -> None:
            nonlocal is_begun
            is_begun = True
            await begin()

        task = asyncio.create_task(operation(), name=f"hotlun at {place}")
        task.add_done_callback(has_returned)
        await asyncio.shield(task)

    async def _wait(self, place: Hashable) -> None:
        deadline = asyncio.get_running_loop().time() + self._timeout
        while (earlier := self._running.get(place)) is not None:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                raise OutcomeUnknownError(
                    f"what was begun there before goes on after {self._timeout:g} s, so this was "
                    "not begun; wait for it, or end the VM"
                )
            await asyncio.wait((earlier,), timeout=left)
