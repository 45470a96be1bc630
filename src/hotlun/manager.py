"""The Manager gives disks slots in a running VM and mounts inside it; a Mount is one share.

Coordination only: what a caller wants is decided here in synchronous
functions over the tables, what has to be done about it in `lifecycle`, and it
is done by the `worker`.
"""

from __future__ import annotations

import asyncio
import warnings
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Self, cast

from hotlun import wants
from hotlun.attachments import (
    AttachmentTable,
    DiskRequest,
    extensible_virtual_disk,
    physical_disk,
    status,
    unique_names,
    virtual_disk,
)
from hotlun.backends import base
from hotlun.errors import (
    AlreadyReleasedError,
    DiskConflictError,
    NoAvailableLocationError,
    NotInitializedError,
)
from hotlun.model import Attachment, Disk, ImageFormat, MountConfig, Slot
from hotlun.mounts import MountTable
from hotlun.slots import SlotStatus, SlotTable
from hotlun.wants import DiskState, Handle, MountState
from hotlun.worker import Worker

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator
    from types import TracebackType

    from hotlun.backends.base import GuestBackend, HostBackend
    from hotlun.errors import SlotTakenError


class _Phase(Enum):
    NEW = auto()
    ENTERING = auto()
    ENTERED = auto()
    LEFT = auto()


class Mount:
    """One caller's share of an attachment and, if one was asked for, of a guest mount.

    Given back with `release()`, or by leaving `async with mount`. The last one
    out undoes everything.
    """

    def __init__(self, manager: Manager, handle: Handle, mount_id: str) -> None:
        attachment = handle.disk.attachment
        self._manager = manager
        self._handle = handle
        self.id: str = mount_id
        """Unique, in this process and any other."""
        self.slot: Slot = attachment.slot
        self.serial: str = attachment.serial
        """What the guest reads as the disk's SCSI serial."""
        self.disk: Disk = attachment.disk
        self.config: MountConfig | None = handle.mount.config if handle.mount else None
        self.guest_path: str | None = handle.mount.path if handle.mount else None
        """Where it is mounted inside the guest; None when nothing was mounted."""

    @property
    def controller(self) -> int:
        return self.slot.controller

    @property
    def lun(self) -> int:
        return self.slot.lun

    async def release(self) -> None:
        """Give the references back; the last one out unmounts, unplugs, detaches and revokes.

        A release that failed or was cancelled can be called again: it goes on
        where it stopped.

        Raises:
            AlreadyReleasedError: there is nothing left to give back.
            HotlunError: what the backend raised; the Mount keeps its reference.
        """
        await self._manager._release(self._handle)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.release()
        except AlreadyReleasedError:
            pass
        except Exception as error:
            if exc is None:
                raise
            exc.add_note(f"then, releasing {self!r}: {error}")

    def __repr__(self) -> str:
        where = f" mounted at {self.guest_path}" if self.guest_path else ""
        return f"<Mount {self.id}: {self.disk} at slot {self.slot}{where}>"


class Manager:
    """Attaches and mounts disks in one running VM, shares them, and takes them away again.

    Args:
        host: attaches disks to the VM.
        guest: has them mounted inside it.
        controllers: how many SCSI controllers the VM has.
        luns_per_controller: how many LUNs each of them has.
        guest_mount_format: for generated guest paths, with exactly one `%d`; the
            default is `/run/mounts/scsi/m%d`, or `c:\\mounts\\scsi\\m%d` in Windows.
        reserved_slots: given out to nobody, and never detached.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: no controllers or LUNs, a reserved slot out of range, a wrong format.
    """

    def __init__(
        self,
        host: HostBackend,
        guest: GuestBackend,
        *,
        controllers: int = 4,
        luns_per_controller: int = 64,
        guest_mount_format: str | None = None,
        reserved_slots: Iterable[Slot] = (),
    ) -> None:
        if not isinstance(host, base.HostBackend):
            raise TypeError(f"host is no HostBackend: {host!r}")
        if not isinstance(guest, base.GuestBackend):
            raise TypeError(f"guest is no GuestBackend: {guest!r}")
        for name, count in (("controllers", controllers), ("LUNs", luns_per_controller)):
            if not isinstance(count, int):
                raise TypeError(f"the number of {name} is an int: {count!r}")
            if count < 1:
                raise ValueError(f"a VM without {name} has no slots: {count}")
        self._host = host
        self._guest = guest
        self._slots = SlotTable(controllers, luns_per_controller, base.usable_controllers(guest))
        for slot in (reserved := list(reserved_slots)):
            if not isinstance(slot, Slot):
                raise TypeError(f"a reserved slot is a Slot: {slot!r}")
            if slot not in self._slots:
                raise ValueError(f"the VM has no slot {slot} to reserve")
        self._slots.reserve(reserved, "reserved by the caller")
        self._attachments = AttachmentTable()
        self._guest_mounts = MountTable(guest_mount_format, base.os_type(guest))
        self._worker = Worker(host, guest, settle=self._settle, relocate=self._relocate)
        self._phase = _Phase.NEW
        self._mounts: dict[Handle, Mount] = {}
        self._names = unique_names()

    # --- Entering and leaving ---

    async def __aenter__(self) -> Self:
        if self._phase is not _Phase.NEW:
            raise NotInitializedError("a Manager is entered once: make another one")
        self._phase = _Phase.ENTERING
        try:
            taken = await base.occupied(self._host)
        except BaseException:
            self._phase = _Phase.NEW
            raise
        self._slots.reserve(taken, "a disk of the VM's own")
        self._phase = _Phase.ENTERED
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop_adding()
        try:
            await self.release_all()
        except asyncio.CancelledError:
            self._halt()
            raise
        except ExceptionGroup as group:
            if exc is None:
                raise
            for error in group.exceptions:
                exc.add_note(f"then, leaving the Manager: {error}")

    def _stop_adding(self) -> None:
        self._phase = _Phase.LEFT
        for disk in self._attachments:
            for waiter in disk.waiters:
                if waiter.is_adding and not waiter.answer.done():
                    waiter.answer.set_exception(self._not_open())
            for handle in list(disk.handles):
                if handle not in self._mounts:
                    if not handle.answer.done():
                        handle.answer.set_exception(self._not_open())
                    wants.drop(handle)
            self._worker.wake(disk)

    def _halt(self) -> None:
        remaining = []
        for disk in self._attachments:
            wants.halt(disk)
            self._worker.wake(disk)
            if not disk.is_gone:
                remaining.append(f"{disk.attachment.disk} at slot {disk.attachment.slot}")
        if remaining:
            warnings.warn(
                f"leaving the Manager was cancelled; what remains: {', '.join(remaining)}. "
                "Release the mounts, or call release_all() again",
                ResourceWarning,
                stacklevel=3,
                source=self,
            )

    def _not_open(self) -> NotInitializedError:
        if self._phase is _Phase.LEFT:
            return NotInitializedError("the Manager has been left: make and enter another one")
        return NotInitializedError("the Manager has not been entered: use `async with`")

    # --- Adding ---

    async def add_virtual_disk(
        self,
        host_path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        vm_id: str = "",
        guest_path: str = "",
        mount: MountConfig | None = None,
        format: ImageFormat | None = None,  # noqa: A002 - the contract's name
    ) -> Mount:
        """Attach an image file and, if asked for, mount it.

        Args:
            host_path: the image; it need not exist here.
            read_only: for the guest and the hypervisor.
            vm_id: who is granted access to it, if anybody.
            guest_path: where to mount it; generated if empty.
            mount: how to mount it; None attaches without mounting.
            format: the image's; if None it follows from the suffix.

        Raises:
            ValueError: an argument contradicts another, or can never be right.
            NotInitializedError: the Manager is not entered, or is left.
            DiskConflictError: the disk is in use in another way.
            GuestPathConflictError: the path collides with another guest mount's.
            NoAvailableLocationError: every slot is taken.
            UnsupportedError: the backend or guest cannot do it.
            HotlunError: what the backend raised; whatever was done is undone.
        """
        ask = partial(virtual_disk, host_path, read_only, format)
        return await self._add(ask, vm_id, guest_path, mount)

    async def add_physical_disk(
        self,
        host_path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        vm_id: str = "",
        guest_path: str = "",
        mount: MountConfig | None = None,
    ) -> Mount:
        """Attach a block device of the host; otherwise as `add_virtual_disk`."""
        ask = partial(physical_disk, host_path, read_only)
        return await self._add(ask, vm_id, guest_path, mount)

    async def add_extensible_virtual_disk(
        self,
        host_path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        guest_path: str = "",
        mount: MountConfig | None = None,
    ) -> Mount:
        """Attach `evd://<provider>/<path>`; otherwise as `add_virtual_disk`."""
        ask = partial(extensible_virtual_disk, host_path, read_only)
        return await self._add(ask, "", guest_path, mount)

    async def _add(
        self,
        ask: partial[DiskRequest],
        vm_id: str,
        guest_path: str,
        config: MountConfig | None,
    ) -> Mount:
        if config is not None and not isinstance(config, MountConfig):
            raise TypeError(f"mount is a MountConfig or None: {config!r}")
        if not isinstance(vm_id, str):
            raise TypeError(f"vm_id is a string: {vm_id!r}")
        if guest_path and config is None:
            raise ValueError("guest_path is for a mount: give mount as well")
        path = self._guest_mounts.normalise(guest_path) if guest_path else ""
        while True:
            if self._phase is not _Phase.ENTERED:
                raise self._not_open()
            answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            # Identified anew each time: after a wait the path may name another file.
            disk, handle = self._decide(ask(), vm_id, path, config, answer)
            try:
                await self._answered(disk, answer)
            except asyncio.CancelledError:
                if handle is not None and not handle.is_gone:
                    wants.drop(handle)
                    self._worker.wake(disk)
                raise
            if handle is not None:
                return self._publish(handle)

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

    def _decide(
        self,
        request: DiskRequest,
        vm_id: str,
        path: str,
        config: MountConfig | None,
        answer: asyncio.Future[None],
    ) -> tuple[DiskState, Handle | None]:
        """Join what is there or begin anew; without a handle, wait for a teardown and ask again."""
        disk = self._find(request)
        if disk is None:
            mount = self._plan(request.disk, path, config)
            disk = self._begin(request, mount)
            return disk, wants.join(disk, mount, vm_id, answer)
        if self._has_to_go(disk, request):
            wants.wait_for(disk, disk, answer, is_adding=True)
            return disk, None
        wants.retry_orphans(disk)
        mount = self._guest_mounts.find(disk, config) if config is not None else None
        if mount is not None and (mount.closing or mount.config != config):
            wants.wait_for(mount, disk, answer, is_adding=True)
            return disk, None
        if mount is None:
            mount = self._plan(disk.attachment.disk, path, config)
        return disk, wants.join(disk, mount, vm_id, answer)

    def _find(self, request: DiskRequest) -> DiskState | None:
        while (disk := self._attachments.find(request)) is not None:
            self._settle(disk)  # a caller that was cancelled may not have had its turn yet
            if not disk.is_gone:
                break
        return disk

    def _has_to_go(self, disk: DiskState, request: DiskRequest) -> bool:
        """Whether the disk is, or will be, in teardown, and cannot be shared before it is over."""
        if disk.closing:
            return True
        try:
            self._attachments.check_sharing(disk, request)
        except DiskConflictError:
            if disk.handles:
                raise
            return True
        return False

    def _plan(self, disk: Disk, path: str, config: MountConfig | None) -> MountState | None:
        if config is None:
            return None
        return self._guest_mounts.plan(disk, config, path, partial(base.check, self._guest))

    def _begin(self, request: DiskRequest, mount: MountState | None) -> DiskState:
        try:
            slot = self._slots.take()
        except NoAvailableLocationError:
            if mount is not None:
                self._guest_mounts.remove(mount)
            raise
        disk = DiskState(Attachment(slot, request.disk, next(self._names)))
        self._attachments.add(disk, request)
        return disk

    def _publish(self, handle: Handle) -> Mount:
        if handle.is_gone:  # the Manager was left before the caller had its turn
            raise self._not_open()
        mount = self._mounts[handle] = Mount(self, handle, next(self._names))
        return mount

    # --- Releasing ---

    async def _release(self, handle: Handle) -> None:
        while handle.is_releasing:  # somebody else is at it
            await asyncio.wait([cast("asyncio.Future[None]", handle.answer)])
        if handle.is_gone:
            raise AlreadyReleasedError(
                "the mount was released before: nothing is left to give back"
            )
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        wants.ask_release(handle, answer)
        await self._answered(handle.disk, answer)

    async def release_all(self) -> None:
        """Release every Mount and clean up whatever nobody owns, after waiting for it.

        Raises:
            NotInitializedError: the Manager has not been entered.
            ExceptionGroup: what failed, after everything was tried.
        """
        if self._phase in (_Phase.NEW, _Phase.ENTERING):
            raise self._not_open()
        handles = list(self._mounts)
        orphans = list(self._orphans())
        outcomes = await asyncio.gather(
            *(self._release(handle) for handle in handles),
            *(self._finish(thing, disk) for thing, disk in orphans),
            return_exceptions=True,
        )
        tried = {thing for thing, _ in orphans}
        outcomes += await asyncio.gather(  # what came to have no owner meanwhile
            *(self._finish(thing, disk) for thing, disk in self._orphans() if thing not in tried),
            return_exceptions=True,
        )
        errors = [
            error
            for error in outcomes
            if isinstance(error, Exception) and not isinstance(error, AlreadyReleasedError)
        ]
        if errors:
            raise ExceptionGroup(
                "not everything could be released: slots() tells what is left, "
                "and release_all() can be called again",
                errors,
            )

    def _orphans(self) -> Iterator[tuple[DiskState | MountState, DiskState]]:
        """What nobody owns, and the disk that it belongs to."""
        for disk in self._attachments:
            if not disk.handles:
                yield disk, disk
            elif disk.handles.keys().isdisjoint(self._mounts):
                continue  # an add's own business
            else:
                yield from ((m, disk) for m in disk.mounts.values() if not m.handles)

    async def _finish(self, thing: DiskState | MountState, disk: DiskState) -> None:
        """Undo what nobody owns, unless somebody comes to own it meanwhile."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        wants.wait_for(thing, disk, answer)
        await self._answered(disk, answer)

    # --- Snapshots ---

    @property
    def mounts(self) -> tuple[Mount, ...]:
        """The live Mounts, oldest first."""
        return tuple(self._mounts.values())

    def slots(self) -> tuple[SlotStatus, ...]:
        """A snapshot of every slot, in order."""
        disks = {disk.slot: disk for disk in self._attachments if disk.slot is not None}
        return tuple(
            status(slot, disks[slot], self._mounts) if slot in disks else self._slots.status(slot)
            for slot in self._slots
        )

    # --- Keeping the tables, for the worker ---

    def _settle(self, disk: DiskState) -> None:
        """Answer the wants on a disk, and give back what it holds no more."""
        wants.settle(disk)
        while disk.unmounted:
            self._guest_mounts.remove(disk.unmounted.pop())
        while disk.left:
            self._mounts.pop(disk.left.pop(), None)
        if disk.vacated and disk.slot is not None:
            self._slots.give_back(disk.slot)
            disk.slot = None
        if disk.is_gone and disk in self._attachments:
            self._attachments.remove(disk)

    def _relocate(self, disk: DiskState, error: SlotTakenError) -> None:
        """Another slot for a disk whose slot somebody else has.

        Raises:
            NoAvailableLocationError: there is none.
        """
        attachment = disk.attachment
        self._slots.reserve([attachment.slot], f"found taken: {error}")
        disk.slot = None
        try:
            disk.slot = self._slots.take()
        except NoAvailableLocationError as nowhere:
            raise nowhere from error
        disk.attachment = Attachment(disk.slot, attachment.disk, next(self._names))
