"""The Manager gives disks slots in a running VM and mounts inside it; a Mount is one share.

What it is asked for is done by what its `session` has at work.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Self

from hotlun import handover
from hotlun.attachments import extensible_virtual_disk, physical_disk, virtual_disk
from hotlun.backends import base
from hotlun.gate import Phase
from hotlun.model import Slot
from hotlun.mount_handle import Mount
from hotlun.mounts import MountTable
from hotlun.session import Session
from hotlun.slots import SlotTable

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping
    from types import TracebackType

    from hotlun.backends.base import GuestBackend, HostBackend
    from hotlun.event_streams import EventStream
    from hotlun.journal import Journal
    from hotlun.model import ImageFormat, MountConfig
    from hotlun.reconciliation import Disagreement
    from hotlun.slots import SlotStatus

__all__ = ["Manager", "Mount"]


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
        journal: where what is attached and mounted is written down, so that it outlives this
            process; None, and leaving releases everything.

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
        journal: Journal | None = None,
    ) -> None:
        if not isinstance(host, base.HostBackend):
            raise TypeError(f"host is no HostBackend: {host!r}")
        if not isinstance(guest, base.GuestBackend):
            raise TypeError(f"guest is no GuestBackend: {guest!r}")
        usable = base.usable_controllers(guest)
        slots = SlotTable(controllers, luns_per_controller, usable)
        for slot in (reserved := list(reserved_slots)):
            if not isinstance(slot, Slot):
                raise TypeError(f"a reserved slot is a Slot: {slot!r}")
            if slot not in slots:
                raise ValueError(f"the VM has no slot {slot} to reserve")
        slots.reserve(reserved, "reserved by the caller")
        guest_mounts = MountTable(guest_mount_format, base.os_type(guest))
        self._session = Session(host, guest, slots, guest_mounts, journal, self)
        self._callers = self._session.callers
        self._reconciler = self._session.reconciler
        self._tables = self._session.tables

    @classmethod
    def restore(
        cls,
        document: Mapping[str, Any],
        host: HostBackend,
        guest: GuestBackend,
        *,
        paths: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> Self:
        """A Manager that goes on where another one was saved; to be entered, as any.

        Args:
            document: what `save()` returned.
            host: connected to the hypervisor that the VM has moved to.
            guest: connected to the agent in it.
            paths: from paths of disks there to paths here: of a disk, or of a folder that
                it lies below.
            arguments: as for `Manager`; a journal has to be empty.

        Raises:
            ValueError: it is no such document, or one of a newer hotlun.
        """
        brought = handover.read(document, paths or {})
        manager = cls(host, guest, **{**handover.arguments(document), **arguments})
        manager._session.inheritance.brought = brought
        return manager

    # --- Entering and leaving ---

    async def __aenter__(self) -> Self:
        """Take up what the journal has, look what has become of it, and settle that.

        Raises:
            NotInitializedError: it was entered before.
            JournalError: the journal is another process's, or cannot be read.
            HotlunError: the hypervisor does not answer.
        """
        await self._session.enter()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._session.leave()
        except ExceptionGroup as group:
            if exc is None:
                raise
            for error in group.exceptions:
                exc.add_note(f"then, leaving the Manager: {error}")

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
        owner: str = "",
    ) -> Mount:
        """Attach an image file and, if asked for, mount it.

        Args:
            host_path: the image; it need not exist here.
            read_only: for the guest and the hypervisor.
            vm_id: who is granted access to it, if anybody.
            guest_path: where to mount it; generated if empty.
            mount: how to mount it; None attaches without mounting.
            format: the image's; if None it follows from the suffix.
            owner: whom it is held for, for `release_owner`: any text, `pid:` for this
                process or `pid:NUMBER` for another.

        Raises:
            ValueError: an argument contradicts another, or can never be right.
            NotInitializedError: the Manager is not entered, or is left.
            DiskConflictError: the disk is in use in another way.
            GuestPathConflictError: the path collides with another guest mount's.
            NoAvailableLocationError: every slot is taken.
            UnsupportedError: the backend or guest cannot do it.
            JournalError: it cannot be written down, and so it is not done, or undone.
            HotlunError: what the backend raised; whatever was done is undone.
        """
        ask = partial(virtual_disk, host_path, read_only, format)
        return await self._callers.add(ask, vm_id, guest_path, mount, owner)

    async def add_physical_disk(
        self,
        host_path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        vm_id: str = "",
        guest_path: str = "",
        mount: MountConfig | None = None,
        owner: str = "",
    ) -> Mount:
        """Attach a block device of the host; otherwise as `add_virtual_disk`."""
        ask = partial(physical_disk, host_path, read_only)
        return await self._callers.add(ask, vm_id, guest_path, mount, owner)

    async def add_extensible_virtual_disk(
        self,
        host_path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        guest_path: str = "",
        mount: MountConfig | None = None,
        owner: str = "",
    ) -> Mount:
        """Attach `evd://<provider>/<path>`; otherwise as `add_virtual_disk`."""
        ask = partial(extensible_virtual_disk, host_path, read_only)
        return await self._callers.add(ask, "", guest_path, mount, owner)

    # --- Releasing ---

    async def release_all(self) -> None:
        """Release every Mount and clean up whatever nobody owns, after waiting for it.

        Raises:
            NotInitializedError: the Manager has not been entered; or it was left, and its
                journal keeps the mounts; or it was saved.
            ExceptionGroup: what failed, after everything was tried.
        """
        await self._session.release_all()

    async def release_owner(self, owner: str) -> None:
        """Release every Mount that is held for this owner; one that has none of them is fine.

        Args:
            owner: as it was given when they were added, or as `Mount.owner` has it. Of
                processes with this number, one that has ended goes first.

        Raises:
            NotInitializedError: the Manager has not been entered, or was left.
            ExceptionGroup: what failed, after everything was tried.
        """
        await self._callers.release_owner(owner)

    def dead_owners(self) -> tuple[str, ...]:
        """The owners that are processes, hold something, and have ended: `release_owner` them."""
        owners = dict.fromkeys(handle.owner for handle in self._tables.mounts)
        return tuple(owner.name for owner in owners if owner.has_ended())

    async def forget(self, *, force: bool = False) -> None:
        """Drop everything, when the VM is gone or has moved: nobody is asked to undo anything.

        What was granted is revoked, unless the Manager was saved: then it was handed over.

        Args:
            force: do not ask first whether the VM is gone.

        Raises:
            NotInitializedError: the Manager has not been entered, or was left.
            JournalError: the journal could not be emptied: forget() again.
            HotlunError: the VM still runs.
            ExceptionGroup: a grant could not be revoked.
        """
        await self._session.forget(force=force)

    # --- What others do to the disks ---

    async def reconcile(self) -> tuple[Disagreement, ...]:
        """Ask hypervisor and guest what they have, and settle what disagrees.

        This also happens on entering, and by itself when a connection is back or as long
        as something is unresolved.

        Raises:
            NotInitializedError: the Manager has not been entered, or was left.
            HotlunError: the hypervisor does not answer.
        """
        self._session.gate.check(Phase.ENTERED)
        return await self._reconciler.reconcile()

    def events(self) -> EventStream:
        """What happens from now on to the VM and its disks; an async iterator.

        It ends when the Manager is left. Who is slow misses the oldest of more than a
        thousand events, and is told so.
        """
        return self._session.events.open()

    # --- Moving to another host ---

    async def save(self) -> dict[str, Any]:
        """Freeze, and say in a document all that a Manager on another host has to know.

        For a live migration: save, migrate the VM, then `Manager.restore` over there, and
        `forget()` here. Nothing can be added or released in between. If the VM stays,
        `thaw()`. Leaving a Manager that is frozen releases nothing.

        Returns:
            What JSON can hold. Keys are in it as digests only.

        Raises:
            NotInitializedError: the Manager has not been entered, or was left; or it was thawed
                or left meanwhile.
        """
        return await self._session.save()

    def thaw(self) -> None:
        """Go on after all: the VM has not moved.

        Raises:
            NotInitializedError: the Manager is not frozen.
        """
        self._session.thaw()

    # --- Snapshots ---

    @property
    def mounts(self) -> tuple[Mount, ...]:
        """The live Mounts, oldest first."""
        return tuple(self._tables.mounts.values())

    def slots(self) -> tuple[SlotStatus, ...]:
        """A snapshot of every slot, in order."""
        return self._tables.statuses()
