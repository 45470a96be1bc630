"""Disks for a VM of QEMU, over its monitor (QMP).

A disk is two things there: a block node, and a `scsi-hd` device that shows it to
the guest. Both have one id, made from the attachment's serial, which is also the
serial that the guest reads; as it is never used again, a late `detach` cannot
meet a newer disk.

Commands and their deadlines are in `link`, how a lost connection comes back in `monitor`,
what QEMU's refusals mean in `refusals` and its events in `news`, what a disk is to QEMU in
`nodes` and `providers`, how it is put in and taken out again in `addition` and `removal`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from hotlun.backends.access import AccessGrants
from hotlun.backends.addition import add_device
from hotlun.backends.attached import Attached, Known, id_of
from hotlun.backends.errand import Errand
from hotlun.backends.migration import command_line, device_properties
from hotlun.backends.monitor import Monitor
from hotlun.backends.news import News
from hotlun.backends.nodes import block_node
from hotlun.backends.removal import remove_device
from hotlun.backends.survey import look
from hotlun.backends.topology import find_controllers, occupied_slots
from hotlun.errors import (
    BackendError,
    HotlunError,
    OutcomeUnknownError,
    UnsupportedError,
    VMGoneError,
)
from hotlun.events import ConnectionLost, VMGone
from hotlun.model import DiskIdentity, Presence

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence

    from hotlun.backends.base import Listener
    from hotlun.backends.topology import Controller
    from hotlun.events import Event
    from hotlun.model import Attachment, Disk, Slot

_log = logging.getLogger("hotlun.qemu")
_DEVICE_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_HIGHEST_LUN = 255
"""QEMU 7.2 takes more, but a Linux guest does not see them (flat addressing ends there)."""


class QEMUHostBackend:
    """The `HostBackend` for one running VM; made by `connect`.

    Methods may be called side by side. One that is cancelled may or may not have
    happened, as with `OutcomeUnknownError`. A connection that is lost comes back by itself;
    calls made meanwhile wait for it, as long as for an answer. When QEMU has ended,
    whatever needs it raises `VMGoneError`.
    """

    def __init__(
        self,
        monitor: Monitor,
        controllers: Sequence[Controller],
        allow_backing: Collection[str] = (),
    ) -> None:
        self._monitor = monitor
        self._controllers = tuple(controllers)
        self._allow_backing = tuple(allow_backing)
        self._grants = AccessGrants()
        self._known = Known()
        self._news = News(self._known.find)
        self._listeners: dict[object, Listener] = {}
        monitor.on_event = self._hear
        monitor.on_change = self._tell

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        qmp_socket: str | os.PathLike[str],
        *,
        controllers: Sequence[str] = ("scsi0", "scsi1", "scsi2", "scsi3"),
        timeout: float = 30.0,
        allow_backing: Collection[str | os.PathLike[str]] = (),
    ) -> AsyncIterator[QEMUHostBackend]:
        """Connect to a VM; `async with` it. Leaving disconnects, and detaches nothing.

        Args:
            qmp_socket: the unix socket of a monitor that no other client uses.
            controllers: QEMU device ids of its SCSI controllers; the first is our number 0.
            timeout: seconds, for connecting and for every command and event after that.
            allow_backing: files that a qcow2 image may have as its backing file; every
                other image with one is refused.

        Raises:
            ValueError: no controllers, one twice, or something that is no device id.
            UnsupportedError: there are no unix sockets here: on Windows.
            BackendError: nobody answers there, or the VM lacks a controller.
        """
        if isinstance(controllers, str) or not controllers:
            raise ValueError(f"controllers is a sequence of device ids: {controllers!r}")
        if len(set(controllers)) < len(controllers):
            raise ValueError(f"a controller is named twice: {controllers!r}")
        for name in controllers:
            if not _DEVICE_ID.fullmatch(name):
                raise ValueError(f"no QEMU device has this id: {name!r}")
        if timeout <= 0:
            raise ValueError(f"timeout is in seconds, more than 0: {timeout!r}")
        if not hasattr(asyncio, "open_unix_connection"):
            raise UnsupportedError(
                f"QEMU's monitor is a unix socket, which asyncio cannot open on {sys.platform}: "
                "run this where QEMU runs, on Linux; VMs of Hyper-V take HCSHostBackend",
                operation="connect",
            )
        allowed = [os.fspath(path) for path in allow_backing]
        async with Monitor.open(os.fspath(qmp_socket), timeout) as monitor:
            found = await find_controllers(monitor, Errand("connect"), controllers)
            yield cls(monitor, found, allowed)

    async def attach(self, attachment: Attachment) -> None:
        """Add the block node, and the device on it; the node goes again if the device fails.

        Raises:
            SlotTakenError: another device of the VM is at this slot.
            UnsupportedError: no such slot or provider is to be had here.
            BackendError: it cannot be done, and nothing is left of it.
            OutcomeUnknownError: it may have been done, all or in part; `detach` undoes it.
        """
        errand = Errand.on(attachment, "attach")
        bus = self._bus(attachment.slot, errand)
        name = id_of(attachment)
        try:
            node = block_node(attachment.disk, name, allow_backing=self._allow_backing)
        except (BackendError, UnsupportedError) as error:
            raise errand.error(type(error), str(error), detail=error.detail) from error
        self._known.comes(attachment)
        try:
            device = device_properties(attachment, bus)
            await add_device(self._monitor, errand, name, node.arguments, device)
        except OutcomeUnknownError:
            raise
        except HotlunError:
            self._known.does_not_come(attachment)
            raise
        self._known.is_there(Attached(attachment, node.size, node.arguments))

    def identity(self, attachment: Attachment) -> DiskIdentity:
        """The serial that the guest reads, and the size that the disk had when it was attached.

        The size is None where only QEMU or a server knows it (VHD, NBD), and for what
        another process attached until a `survey` has found it.
        """
        return DiskIdentity(attachment.serial, self._known.size(attachment.serial))

    async def detach(self, attachment: Attachment) -> None:
        """Remove this attachment's device and node, as far as they are there.

        Raises:
            BackendError: QEMU or the guest refused; the disk is still attached.
            OutcomeUnknownError: it may have been done, all or in part; try again.
        """
        was_there = self._known.goes(attachment)
        try:
            await remove_device(self._monitor, Errand.on(attachment, "detach"), id_of(attachment))
        except VMGoneError:
            raise
        except BackendError:
            if was_there is not None:
                self._known.is_there(was_there)
            raise
        self._known.is_gone(attachment)

    async def survey(self, attachments: Collection[Attachment]) -> Mapping[str, Presence]:
        """How much of each attachment the VM has, by serial; nothing is changed.

        Present is what has its device at its slot and its node as it was attached, whoever did
        that; from now on it is known here as if this process had attached it. A device whose
        removal has begun cannot always be told from one that stays.

        Raises:
            BackendError: the VM does not answer.
        """
        wanted = {attachment.serial: attachment for attachment in attachments}
        errand = Errand("survey the disks")
        with self._known.undisturbed(wanted) as quiet:
            seen = await look(self._monitor, errand, self._controllers, wanted.values())
        for serial in quiet:
            if seen[serial].presence is Presence.PRESENT:
                if serial not in self._known:
                    sight = seen[serial]
                    self._known.is_there(
                        Attached(wanted[serial], sight.size, None, sight.has_backing)
                    )
            elif seen[serial].presence is Presence.PARTIAL:
                self._known.goes(wanted[serial])
            else:
                self._known.is_gone(wanted[serial])
        return {serial: sight.presence for serial, sight in seen.items()}

    def watch(self, listener: Listener) -> Callable[[], None]:
        """Have `listener` called, in the loop, with what happens to the VM and its disks.

        Told are resets, shutdowns, pauses and resumptions of the VM, failures of disks that are
        known here (attached by this process, or found by a `survey`), and what becomes of the
        connection. What happens while there is none is not told. A listener that raises is
        logged.

        Returns:
            The function that ends it; again makes no difference.
        """
        key = object()
        self._listeners[key] = listener

        def unsubscribe() -> None:
            self._listeners.pop(key, None)

        return unsubscribe

    def device_arguments(self, *, paths: Mapping[str, str] = {}) -> list[str]:
        """QEMU arguments that give another VM the disks that are attached to this one now.

        For the destination of a live migration: `-blockdev` and `-device` with the same ids,
        places and serials as here, the lowest slot first, for whatever this process has
        attached or a `survey` has found. No image is read, but for those that another process
        has attached over a backing file.

        What the destination needs besides, with QEMU 7.2:

        * The same machine and controllers, with the same ids and at the same PCI addresses. A
          disk's state is sent under its controller's PCI address and LUN, and one that finds no
          such place there fails the migration; so state `addr=`, or give the same devices in
          the same order, before these arguments.
        * The arguments of the disks that are attached when `migrate` begins: attach and detach
          none from then on.
        * `-incoming` on the same command line. Only then does QEMU open the images without
          locking them, until the source has let go of them at the end of the migration;
          without it, `Failed to get "write" lock`. If the source goes on (the migration failed
          or was cancelled), end the destination.
        * The same bytes in the images, on storage that both hosts see alike. Images are
          opened before the source has written its last; QEMU reads a qcow2's tables again when
          it takes over, so their formats stay as they are.
        * No VHD and no VHDX: QEMU does not migrate a VM that has one (`does not support live
          migration`); detach it first.
        * Access to the files for the user that the destination runs as (`grant_access`).

        The order of nodes and the names that QEMU gives to others do not matter.

        Args:
            paths: a path here -> the path there, of an image, a backing file, a block device or
                a server's socket, or of a folder above it; the longest that fits counts. What is
                not in it has the same path there.

        Raises:
            BackendError: an image that another process has attached over a backing file cannot
                be read.
        """
        return command_line(
            [
                (entry, self._controllers[entry.attachment.slot.controller].bus_name)
                for entry in self._known.in_slot_order()
            ],
            paths,
            allow_backing=self._allow_backing,
        )

    async def occupied(self) -> Collection[Slot]:
        """The slots of our controllers that hold any device now.

        Raises:
            BackendError: the VM does not answer.
        """
        return await occupied_slots(self._monitor, Errand("list the disks"), self._controllers)

    def plan_grant(self, disk: Disk, vm_id: str) -> str:
        """What `grant_access` is going to change, as text for `adopt_grant` in another process.

        Changes nothing. If the grant has been made already, what it has changed. `""` if there
        is nothing to take back: for root, for what everybody may open, for an extensible
        virtual disk. Write it down before the grant.

        Raises:
            BackendError: no such user or file.
            UnsupportedError: the file system has no ACLs.
        """
        return self._grants.plan(disk, vm_id, allow_backing=self._allow_backing)

    def adopt_grant(self, disk: Disk, vm_id: str, plan: str) -> None:
        """Take over a grant that an earlier process has planned, whether or not it was made.

        To be called for all of them, in the order of granting, before any grant and revoke
        of this process. A file that has another one's path by now is left alone.

        Raises:
            BackendError: the plan is not understood.
        """
        self._grants.adopt(disk, vm_id, plan)

    async def grant_access(self, disk: Disk, vm_id: str) -> None:
        """Let the user that the VM runs as open the disk: POSIX ACLs on file and folders.

        Args:
            disk: an image or a host block device.
            vm_id: a user name, or a uid in decimal.

        Raises:
            BackendError: no such user or file, or the ACL may not be changed.
            UnsupportedError: the file system has no ACLs, or the disk is no file.
        """
        self._grants.grant(disk, vm_id, allow_backing=self._allow_backing)

    async def revoke_access(self, disk: Disk, vm_id: str) -> None:
        """Undo what `grant_access` changed, and nothing else.

        Raises:
            BackendError: an ACL may not be changed.
        """
        self._grants.revoke(disk, vm_id)

    def _bus(self, slot: Slot, errand: Errand) -> str:
        if slot.controller >= len(self._controllers):
            names = ", ".join(controller.id for controller in self._controllers)
            raise errand.error(
                UnsupportedError,
                f"connected are the controllers {names}, counted from 0; "
                "connect with more, or give the Manager fewer",
            )
        if slot.lun > _HIGHEST_LUN:
            raise errand.error(
                UnsupportedError,
                f"guests see LUNs 0 to {_HIGHEST_LUN}; use a lower one",
            )
        return self._controllers[slot.controller].bus_name

    def _hear(self, message: Mapping[str, object]) -> None:
        event = self._news.of(message)
        if event is not None:
            self._tell(event)

    def _tell(self, event: Event) -> None:
        if isinstance(event, ConnectionLost):
            # What one connection said is no reason for what the next one says.
            self._news = News(self._known.find)
        if isinstance(event, VMGone):
            self._known.forget()
        for listener in tuple(self._listeners.values()):
            try:
                listener(event)
            except Exception:
                _log.exception("a listener failed at %s", event)
