"""Those who wait: each says what it wants, has the worker look, and awaits its own answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from hotlun import wants
from hotlun.errors import AlreadyReleasedError, JournalError, VMGoneError
from hotlun.gate import Phase
from hotlun.model import MountConfig
from hotlun.mount_handle import Mount
from hotlun.owners import Owner, this_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hotlun.attachments import DiskRequest
    from hotlun.gate import Gate
    from hotlun.recorder import Recorder
    from hotlun.states import DiskState, Handle, MountState
    from hotlun.tables import Tables
    from hotlun.worker import Worker


class Callers:
    """What the callers of one Manager wait for.

    Args:
        tables: where their wants are.
        worker: takes the steps that they want.
        recorder: writes down who holds what, before that is told.
        gate: refuses them when it is not the time.
    """

    def __init__(self, tables: Tables, worker: Worker, recorder: Recorder, gate: Gate) -> None:
        self._tables = tables
        self._worker = worker
        self._recorder = recorder
        self._gate = gate

    async def _answered(self, disk: DiskState, answer: asyncio.Future[None]) -> None:
        """Have the worker look at a disk whose wants changed, and wait for the answer."""
        self._worker.wake(disk)
        try:
            await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled():
                answer.exception()  # meant for a caller that is gone: no news to anybody
            self._worker.wake(disk)
            raise

    # --- Adding ---

    async def add(
        self,
        ask: Callable[[], DiskRequest],
        vm_id: str,
        guest_path: str,
        config: MountConfig | None,
        owner: str,
    ) -> Mount:
        """Attach a disk and, if asked for, mount it; as `Manager.add_virtual_disk`.

        Args:
            ask: finds out which disk is meant.
        """
        if config is not None and not isinstance(config, MountConfig):
            raise TypeError(f"mount is a MountConfig or None: {config!r}")
        if not isinstance(vm_id, str):
            raise TypeError(f"vm_id is a string: {vm_id!r}")
        if guest_path and config is None:
            raise ValueError("guest_path is for a mount: give mount as well")
        path = self._tables.guest_mounts.normalise(guest_path) if guest_path else ""
        holder = Owner.named(owner)
        if config is not None and config.key is not None and self._gate.is_open():
            await self._recorder.seal(config.key)
        while True:
            self._gate.check(Phase.ENTERED)
            answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            # Identified anew each time: after a wait the path may name another file.
            disk, handle = self._tables.decide(ask(), vm_id, path, config, answer, holder)
            try:
                await self._answered(disk, answer)
            except asyncio.CancelledError:
                if handle is not None and not handle.is_gone:
                    self._withdraw(handle)
                raise
            if handle is not None:
                return self._publish(handle)

    def _publish(self, handle: Handle) -> Mount:
        if handle.is_gone:  # the Manager was left before the caller had its turn
            raise self._gate.refusal()
        self._tables.name(handle)
        try:
            self._recorder.write(handle.disk)
        except JournalError:  # a holder that is not written down would hold nothing tomorrow
            handle.id = ""
            self._withdraw(handle)
            raise
        return self.hold(handle)

    def _withdraw(self, handle: Handle) -> None:
        wants.drop(handle)
        self._worker.wake(handle.disk)

    def hold(self, handle: Handle) -> Mount:
        """The Mount that the handle is from now on."""
        mount = self._tables.mounts[handle] = Mount(handle, self.give_back)
        return mount

    def turn_away(self) -> None:
        """Refuse all whose adds are under way."""
        for disk in self._tables.disks:
            for waiter in disk.waiters:
                if waiter.is_adding and not waiter.answer.done():
                    waiter.answer.set_exception(self._gate.refusal())
            for handle in list(disk.handles):
                if handle not in self._tables.mounts:
                    if not handle.answer.done():
                        handle.answer.set_exception(self._gate.refusal())
                    wants.drop(handle)
            self._worker.wake(disk)

    # --- Releasing ---

    async def give_back(self, handle: Handle) -> None:
        """Give a Mount's references back.

        Raises:
            AlreadyReleasedError: somebody did before.
            NotInitializedError: the Mounts are not this Manager's any more.
            HotlunError: what the backend raised.
        """
        self._gate.check_ours()
        while handle.is_releasing:  # somebody else is at it
            await asyncio.wait([cast("asyncio.Future[None]", handle.answer)])
            if not handle.is_gone:
                self._gate.check_ours()  # the Manager may have been left or saved meanwhile
        if handle.is_gone:
            raise AlreadyReleasedError(
                "the mount was released before: nothing is left to give back"
            )
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        wants.ask_release(handle, answer)
        await self._answered(handle.disk, answer)

    async def release_owner(self, owner: str) -> None:
        """Give back the references of every Mount of this owner; see `Manager.release_owner`."""
        self._gate.check(Phase.ENTERED)
        held = self._tables.held_for(this_process() if owner == "pid:" else owner)
        outcomes = await asyncio.gather(*map(self.give_back, held), return_exceptions=True)
        _raise_all(outcomes, f"not all of {owner!r} could be released: release_owner() again")

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
        _raise_all(
            outcomes,
            "not everything could be released: slots() tells what is left, "
            "and release_all() can be called again",
        )

    async def _finish(self, thing: DiskState | MountState, disk: DiskState) -> None:
        """Undo what nobody owns, unless somebody comes to own it meanwhile."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        wants.wait_for(thing, disk, answer)
        await self._answered(disk, answer)


def _raise_all(outcomes: Iterable[object], message: str) -> None:
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
