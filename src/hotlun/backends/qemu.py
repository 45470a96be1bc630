"""Disks for a VM of QEMU, over its monitor (QMP).

A disk is two things there: a block node, and a `scsi-hd` device that shows it to
the guest. Both have one id, made from the attachment's serial, which is also the
serial that the guest reads; as it is never used again, a late `detach` cannot
meet a newer disk.

Removing a device is a request: QEMU replies at once and frees the node about 50
ms later (an RCU grace period; measured with 7.2), when it sends `DEVICE_DELETED`.
So the listener is there before the command, and each disk waits for its own
event: taking out 64 takes as long as one.

Commands, events and their deadlines are in `monitor`, what QEMU's refusals mean in
`refusals`, what a disk is to QEMU in `nodes` and `providers`.
"""

from __future__ import annotations

import os
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from hotlun.backends.access import AccessGrants
from hotlun.backends.errand import Errand
from hotlun.backends.monitor import Monitor
from hotlun.backends.nodes import block_node
from hotlun.backends.refusals import Meaning
from hotlun.backends.topology import find_controllers, occupied_slots
from hotlun.errors import BackendError, HotlunError, OutcomeUnknownError, UnsupportedError
from hotlun.model import DiskIdentity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence

    from hotlun.backends.topology import Controller
    from hotlun.model import Attachment, Disk, Slot

_DEVICE_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_HIGHEST_LUN = 255
"""QEMU 7.2 takes more, but a Linux guest does not see them (flat addressing ends there)."""


class QEMUHostBackend:
    """The `HostBackend` for one running VM; made by `connect`.

    Methods may be called side by side. One that is cancelled may or may not have
    happened, as with `OutcomeUnknownError`.
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
        self._sizes: dict[str, int] = {}
        """Of what is attached, in bytes, by serial."""

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
        allowed = [os.fspath(path) for path in allow_backing]
        async with Monitor.open(os.fspath(qmp_socket), timeout) as monitor:
            found = await find_controllers(monitor, Errand("connect"), controllers)
            yield cls(monitor, found, allowed)

    async def attach(self, attachment: Attachment) -> None:
        """Add the block node, then the device on it; the node goes again if the device fails.

        Raises:
            SlotTakenError: another device of the VM is at this slot.
            UnsupportedError: no such slot or provider is to be had here.
            BackendError: it cannot be done, and nothing is left of it.
            OutcomeUnknownError: it may have been done, all or in part; `detach` undoes it.
        """
        errand = Errand.on(attachment, "attach")
        bus = self._bus(attachment.slot, errand)
        name = _name(attachment)
        try:
            node = block_node(attachment.disk, name, allow_backing=self._allow_backing)
        except (BackendError, UnsupportedError) as error:
            raise errand.error(type(error), str(error), detail=error.detail) from error
        await self._monitor.command(errand, "blockdev-add", node.arguments)
        device = {
            "driver": "scsi-hd",
            "id": name,
            "drive": name,
            "bus": bus,
            "channel": 0,
            "scsi-id": 0,
            "lun": attachment.slot.lun,
            "serial": attachment.serial,
            "device_id": attachment.serial,
        }
        try:
            await self._monitor.command(errand, "device_add", device)
        except OutcomeUnknownError:
            raise
        except HotlunError:
            await self._undo_node(errand, name)
            raise
        if node.size is not None:
            self._sizes[attachment.serial] = node.size

    def identity(self, attachment: Attachment) -> DiskIdentity:
        """The serial that the guest reads, and the size that the disk had when it was attached.

        The size is None where only QEMU or a server knows it (VHD, NBD), and for what
        another process attached.
        """
        return DiskIdentity(attachment.serial, self._sizes.get(attachment.serial))

    async def detach(self, attachment: Attachment) -> None:
        """Remove this attachment's device and node, as far as they are there.

        Raises:
            BackendError: QEMU or the guest refused; the disk is still attached.
            OutcomeUnknownError: it may have been done, all or in part; try again.
        """
        errand = Errand.on(attachment, "detach")
        name = _name(attachment)
        self._sizes.pop(attachment.serial, None)
        with self._monitor.departures(name) as departures:
            refusal = await self._monitor.command(
                errand,
                "device_del",
                {"id": name},
                expecting=(Meaning.DEVICE_ABSENT, Meaning.BEING_UNPLUGGED),
            )
            # Absent can also mean: asked to go before, and not yet finished with the node.
            if refusal is Meaning.DEVICE_ABSENT and await self._remove_node(errand, name):
                return
            if await self._monitor.next_event(errand, departures) != "DEVICE_DELETED":
                raise errand.error(
                    BackendError,
                    "the guest refuses to let the device go; unplug it there first, then retry",
                    code="DEVICE_UNPLUG_GUEST_ERROR",
                )
        if not await self._remove_node(errand, name):
            raise errand.error(
                OutcomeUnknownError,
                "the device is gone, but something in QEMU still uses the block node; "
                "end the block job or export on it, then retry",
            )

    async def occupied(self) -> Collection[Slot]:
        """The slots of our controllers that hold any device now.

        Raises:
            BackendError: the VM does not answer.
        """
        return await occupied_slots(self._monitor, Errand("list the disks"), self._controllers)

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

    async def _remove_node(self, errand: Errand, name: str) -> bool:
        """Whether the node is gone; if not, something still uses it."""
        refusal = await self._monitor.command(
            errand,
            "blockdev-del",
            {"node-name": name},
            expecting=(Meaning.NODE_ABSENT, Meaning.NODE_IN_USE),
        )
        return refusal is not Meaning.NODE_IN_USE

    async def _undo_node(self, errand: Errand, name: str) -> None:
        try:
            is_gone = await self._remove_node(errand, name)
        except HotlunError as error:
            raise errand.error(
                OutcomeUnknownError,
                "the device was refused, and its block node could not be removed again; detach it",
                code=error.code,
                detail=error.detail,
            ) from error
        if not is_gone:
            raise errand.error(
                OutcomeUnknownError,
                "the device was refused, and its block node is still in use; detach it",
            )


def _name(attachment: Attachment) -> str:
    """The id of an attachment's node and device; 31 characters are the most a node may have."""
    return f"hotlun-{attachment.serial}"
