"""Those who wait: each says what it wants, has the worker look, and awaits its own answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from hotlun import wants
from hotlun.errors import AlreadyReleasedError, VMGoneError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hotlun.tables import Tables
    from hotlun.wants import DiskState, Handle, MountState
    from hotlun.worker import Worker


class Callers:
    """What the callers of one Manager wait for.

    Args:
        tables: where their wants are.
        worker: takes the steps that they want.
        check_ours: raises `NotInitializedError` once the Mounts are somebody else's.
    """

    def __init__(self, tables: Tables, worker: Worker, check_ours: Callable[[], None]) -> None:
        self._tables = tables
        self._worker = worker
        self._check_ours = check_ours

    async def answered(self, disk: DiskState, answer: asyncio.Future[None]) -> None:
        """Have the worker look at a disk whose wants changed, and wait for the answer."""
        self._worker.wake(disk)
        try:
            await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled():
                answer.exception()  # meant for a caller that is gone: no news to anybody
            self._worker.wake(disk)
            raise

    async def give_back(self, handle: Handle) -> None:
        """Give a Mount's references back.

        Raises:
            AlreadyReleasedError: somebody did before.
            NotInitializedError: the Mounts are not this Manager's any more.
            HotlunError: what the backend raised.
        """
        self._check_ours()
        while handle.is_releasing:  # somebody else is at it
            await asyncio.wait([cast("asyncio.Future[None]", handle.answer)])
            if not handle.is_gone:
                self._check_ours()  # the Manager may have been left or saved meanwhile
        if handle.is_gone:
            raise AlreadyReleasedError(
                "the mount was released before: nothing is left to give back"
            )
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        wants.ask_release(handle, answer)
        await self.answered(handle.disk, answer)

    async def let_go(self, handles: Iterable[Handle], *, until_idle: bool = False) -> None:
        """Release these, and undo what nobody owns.

        Args:
            handles: Mounts'.
            until_idle: wait for every step that is under way, whoever wants it.

        Raises:
            ExceptionGroup: what failed, after everything was tried.
        """
        orphans = list(self._tables.orphans())
        outcomes = await asyncio.gather(
            *(self.give_back(handle) for handle in handles),
            *(self._finish(thing, disk) for thing, disk in orphans),
            return_exceptions=True,
        )
        tried = {thing for thing, _ in orphans}
        outcomes += await asyncio.gather(  # what came to have no owner meanwhile
            *(
                self._finish(thing, disk)
                for thing, disk in self._tables.orphans()
                if thing not in tried
            ),
            return_exceptions=True,
        )
        if until_idle:
            await self._worker.idle()
        raise_all(
            outcomes,
            "not everything could be released: slots() tells what is left, "
            "and release_all() can be called again",
        )

    async def _finish(self, thing: DiskState | MountState, disk: DiskState) -> None:
        """Undo what nobody owns, unless somebody comes to own it meanwhile."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        wants.wait_for(thing, disk, answer)
        await self.answered(disk, answer)


def raise_all(outcomes: Iterable[object], message: str) -> None:
    """All errors together; of a VM that is gone one is enough.

    Raises:
        ExceptionGroup: if there are any.
    """
    errors = []
    is_gone = False
    for error in outcomes:
        if not isinstance(error, Exception) or isinstance(error, AlreadyReleasedError):
            continue
        if not (is_gone and isinstance(error, VMGoneError)):
            errors.append(error)
        is_gone = is_gone or isinstance(error, VMGoneError)
    if errors:
        raise ExceptionGroup(message, errors)
