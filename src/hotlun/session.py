"""A Manager at work: from being entered, over being saved and thawed, to being left.

Whatever it has at work is put together here, set going, and brought to rest:

callers      those who wait; what they want is decided over the `tables`
worker       takes the steps that they want
recorder     writes each down before it is taken
reconciler   finds out what others have done to the disks meanwhile
inheritance  what an earlier Manager had
gate         which calls are let through
"""

from __future__ import annotations

import asyncio
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from hotlun import handover, wants
from hotlun.backends import base
from hotlun.callers import Callers
from hotlun.errors import NotInitializedError
from hotlun.event_streams import EventStreams
from hotlun.gate import Gate, Phase
from hotlun.inheritance import Inheritance
from hotlun.reconciler import Reconciler
from hotlun.recorder import Recorder
from hotlun.tables import Tables
from hotlun.worker import Worker

if TYPE_CHECKING:
    from hotlun.backends.base import GuestBackend, HostBackend
    from hotlun.journal import Journal
    from hotlun.mounts import MountTable
    from hotlun.slots import SlotTable
    from hotlun.states import DiskState


class Session:
    """What one Manager has at work.

    Args:
        slots: with what is reserved.
        guest_mounts: empty.
        journal: None, and leaving releases everything.
        manager: whose it is: a warning that something remains is about that.
    """

    def __init__(
        self,
        host: HostBackend,
        guest: GuestBackend,
        slots: SlotTable,
        guest_mounts: MountTable,
        journal: Journal | None,
        manager: object,
    ) -> None:
        self._host = host
        self._survives = journal is not None
        self._manager = manager
        self.gate = Gate(self._survives)
        self.tables = Tables(slots, guest_mounts, partial(base.check, guest))
        self.recorder = Recorder(journal)
        self.worker = Worker(
            host,
            guest,
            settle=self.tables.settle,
            relocate=self.tables.relocate,
            record=self.recorder.write if self._survives else None,
            rested=self._rested,
            answered=self._answered,
        )
        self.callers = Callers(self.tables, self.worker, self.recorder, self.gate)
        self.events = EventStreams()
        self.reconciler = Reconciler(host, guest, self.tables.disks, self.worker, self.events.tell)
        self.inheritance = Inheritance(host, self.tables, self.recorder, self.callers)

    # --- Entering ---

    async def enter(self) -> None:
        """Take up what an earlier Manager had, look what has become of it, and settle that."""
        if self.gate.phase is not Phase.NEW:
            raise NotInitializedError("a Manager is entered once: make another one")
        self.gate.phase = Phase.ENTERING
        try:
            disks = self.inheritance.open()
            taken = set(await base.occupied(self._host))
            self.reconciler.listen()  # before they are asked: nothing is missed
            seen = await self.reconciler.look(disks)
            found = self.inheritance.take_up(disks, seen)
        except BaseException:
            self.gate.phase = Phase.NEW
            self.reconciler.listen_no_more()
            self.recorder.close()
            raise
        own = {disk.slot for disk in disks}
        self.tables.slots.reserve(
            (slot for slot in taken if slot not in own), "a disk of the VM's own"
        )
        self.gate.phase = Phase.ENTERED
        try:
            await self.reconciler.act(found)
        except BaseException:  # nobody is going to leave it
            self._close(Phase.LEFT)
            self._halt()
            raise
        self.reconciler.start()

    # --- Leaving ---

    async def release_all(self) -> None:
        """Release every Mount, and undo what nobody owns; also after leaving.

        Raises:
            NotInitializedError: it was not entered, or the Mounts are not its own any more.
            ExceptionGroup: what failed, after everything was tried.
        """
        self.gate.check(Phase.ENTERED, Phase.LEFT)
        self.gate.check_ours()
        await self.callers.let_go(list(self.tables.mounts), until_idle=self._survives)

    async def leave(self) -> None:
        """Release everything, unless it is to survive; only see to an end what is under way then.

        Raises:
            ExceptionGroup: what failed, after everything was tried.
        """
        is_handed_over = self.gate.is_frozen()
        self._close(Phase.LEFT)
        try:
            await self.reconciler.stop()
            if is_handed_over:
                await self.worker.idle()
            else:
                handles = () if self._survives else list(self.tables.mounts)
                await self.callers.let_go(handles, until_idle=self._survives)
        except asyncio.CancelledError:
            self._halt()
            raise
        finally:
            self._end()

    def _close(self, phase: Phase) -> None:
        """From here on nothing is added."""
        self.gate.phase = phase
        self.callers.turn_away()

    def _halt(self) -> None:
        """Begin nothing more, and warn of what remains."""
        remaining = []
        for disk in self.tables.disks:
            wants.halt(disk)
            self.worker.wake(disk)
            if not disk.is_gone and not (self._survives and disk.handles):
                remaining.append(f"{disk.attachment.disk} at slot {disk.attachment.slot}")
        self._end()
        if remaining:
            warnings.warn(
                f"leaving the Manager was cancelled; what remains: {', '.join(remaining)}. "
                "Release the mounts, or call release_all() again",
                ResourceWarning,
                stacklevel=4,  # where the Manager is entered or left
                source=self._manager,
            )

    def _end(self) -> None:
        """Nobody is told anything more, and the journal is another one's to take."""
        self.reconciler.listen_no_more()
        self.events.end()
        self.worker.when_idle(self.recorder.close)

    # --- Moving to another host ---

    async def save(self) -> dict[str, Any]:
        """Freeze, and write down what a Manager on another host has to know.

        Raises:
            NotInitializedError: it was thawed or left meanwhile.
        """
        self.gate.check(Phase.ENTERED)
        self._close(Phase.FROZEN)
        try:
            await self.reconciler.stop()
            await self.worker.idle()
            await handover.seal(self.tables, self.recorder.salt)
        except BaseException:
            if self.gate.is_frozen():
                self.thaw()
            raise
        if not self.gate.is_frozen():
            raise NotInitializedError("the Manager was thawed or left before it was saved")
        return handover.written(self.tables, self.recorder.salt)

    def thaw(self) -> None:
        """Go on after all.

        Raises:
            NotInitializedError: the Manager is not frozen.
        """
        if not self.gate.is_frozen():
            raise NotInitializedError("the Manager is not frozen: there is nothing to thaw")
        self.gate.phase = Phase.ENTERED
        self.reconciler.start()

    async def forget(self, *, force: bool) -> None:
        """Drop everything, and see whether the VM is gone before, unless forced to.

        Raises:
            HotlunError: the VM still runs.
            JournalError: the journal could not be emptied.
            ExceptionGroup: a grant could not be revoked.
        """
        self.gate.check(Phase.ENTERED, Phase.FROZEN)
        is_handed_over = self.gate.is_frozen()
        if not (force or is_handed_over):
            await self.reconciler.check_gone()
        await self.worker.idle()
        for disk in self.tables.disks:
            if is_handed_over:
                disk.grants.clear()
            wants.forget(disk, "the VM is gone")
            self.worker.wake(disk)
        await self.callers.let_go((), until_idle=True)
        self.recorder.catch_up()

    # --- For the worker ---

    def _answered(self, disk: DiskState) -> None:
        """Who gave the disk back is off the journal before that is told: a step may take long."""
        if disk.changed:
            self.recorder.write_late(disk)

    def _rested(self, disk: DiskState) -> None:
        """The worker has no step to take for the disk."""
        if self._survives:
            self.recorder.write_late(disk)
        if not disk.is_gone:
            self.reconciler.rested(disk)
