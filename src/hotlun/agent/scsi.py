"""SCSI disks as the guest's kernel shows them: found, waited for, and let go.

A disk is known by its address (host:channel:target:LUN), never by its name: `sdX`
follows the order of discovery. What sysfs shows comes before the node in /dev, and
the partitions come after the disk, so each is waited for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from typing import TYPE_CHECKING, NamedTuple

from hotlun.agent import holders
from hotlun.agent.controllers import NoControllerError, scsi_host
from hotlun.agent.errors import RequestError, words
from hotlun.agent.kernel import check_absent
from hotlun.agent.uevents import Deadline
from hotlun.bridge.messages import HResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotlun.agent.kernel import Kernel
    from hotlun.agent.settings import Slot
    from hotlun.agent.uevents import Uevents

_NODE_LOOK_AGAIN = 0.02
"""Seconds between looks for a node in /dev, whose making is not announced without udev."""

_PARTITION_GRACE = 1.0
"""Seconds for a partition to show once its disk can be opened, if the kernel's own
word that it has read the table was spoken before we listened."""


class BlockDevice(NamedTuple):
    """A disk or a partition: its node, its number as `8:1`, its directory in sysfs."""

    slot: Slot
    name: str
    node: str
    number: str
    sysfs: str

    def __str__(self) -> str:
        return f"disk {self.slot} ({self.name})"


class ScsiDisks:
    """The disks on the controllers that the host counts.

    Args:
        kernel: where it shows itself.
        uevents: hears of new and removed devices; listening already.
    """

    def __init__(self, kernel: Kernel, uevents: Uevents) -> None:
        self._kernel = kernel
        self._uevents = uevents

    def find(self, slot: Slot, partition: int = 0) -> BlockDevice | None:
        """The device if it is there now."""
        try:
            disk = self._disk(slot, self._address(slot))
        except NoControllerError:
            return None
        return self._partition(disk, partition) if disk and partition else disk

    def wait_for(self, slot: Slot, partition: int, deadline: Deadline) -> BlockDevice:
        """The device, once it is there and its node in /dev can be opened.

        Raises:
            RequestError: no such controller; no disk or node within the deadline; or
                a disk without this partition.
        """
        address = self._address(slot)
        disk = self._uevents.wait_until(lambda: self._disk(slot, address), address, deadline)
        if disk is None:
            raise RequestError(
                f"disk {slot}: no disk at SCSI address {address} within {deadline.seconds:g} s",
                HResult.TIMEOUT,
            )
        self._wait_for_node(disk, address, deadline)
        if not partition:
            return disk
        part = self._wait_for_partition(disk, partition, address, deadline)
        self._wait_for_node(part, address, deadline)
        return part

    def unplug(self, slot: Slot, deadline: Deadline) -> None:
        """Have the kernel let the disk go; return when its device is gone, or was not there.

        Raises:
            RequestError: it is in use, and by what; or it is still there at the deadline.
        """
        try:
            address = self._address(slot)
            device = self._kernel.target(self._on_bus(address))
        except (NoControllerError, FileNotFoundError):
            return
        disk = self._disk(slot, address)
        paths = [device, *([disk.sysfs] if disk else ())]
        with self._claimed(disk):
            deletion = threading.Thread(
                target=_delete, args=(device,), name=f"delete {address}", daemon=True
            )
            deletion.start()
            deletion.join(deadline.remaining())
            gone = self._uevents.wait_until(
                lambda: None if any(map(os.path.exists, paths)) else True, address, deadline
            )
        if not gone:
            raise RequestError(
                f"{disk or f'disk {slot}'}: the kernel was told to let it go, and still has it "
                f"after {deadline.seconds:g} s",
                HResult.TIMEOUT,
            )

    @contextlib.contextmanager
    def _claimed(self, disk: BlockDevice | None) -> Iterator[None]:
        """Hold the disk so that nothing can mount it any more.

        An exclusive open fails while anything in the kernel holds the disk or a
        partition of it, in whatever namespace. Only then, and without a node that
        can be opened, is it worth the time to look for who that is.
        """
        if disk is None:
            yield
            return
        try:
            claim = os.open(disk.node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            users = holders.users(self._kernel, disk.sysfs)
            if error.errno == errno.EBUSY and not users:
                users = ["something in the kernel, or a process for itself alone"]
            if users:
                raise RequestError(f"{disk} is in use: {'; '.join(users)}") from None
            yield
        else:
            try:
                yield
            finally:
                os.close(claim)

    def _address(self, slot: Slot) -> str:
        return f"{scsi_host(self._kernel, slot.controller)}:0:0:{slot.lun}"

    def _on_bus(self, address: str) -> str:
        return os.path.join(self._kernel.sys, "bus/scsi/devices", address)

    def _disk(self, slot: Slot, address: str) -> BlockDevice | None:
        try:
            block = os.path.join(self._kernel.target(self._on_bus(address)), "block")
        except FileNotFoundError:
            return None
        names = self._kernel.names(block)
        if len(names) > 1:
            raise RequestError(
                f"disk {slot}: SCSI address {address} has more than one block device: "
                + ", ".join(names)
            )
        return self._block_device(slot, os.path.join(block, names[0])) if names else None

    def _partition(self, disk: BlockDevice, partition: int) -> BlockDevice | None:
        """By the kernel's rule: `sda1`, but `nvme0n1p1` after a digit."""
        divider = "p" if disk.name[-1].isdigit() else ""
        path = os.path.join(disk.sysfs, f"{disk.name}{divider}{partition}")
        return self._block_device(disk.slot, path)

    def _block_device(self, slot: Slot, path: str) -> BlockDevice | None:
        try:
            number = self._kernel.read(os.path.join(path, "dev"))
        except OSError as error:
            check_absent(error)
            return None
        name = os.path.basename(path)
        node = os.path.join(self._kernel.dev, name)
        return BlockDevice(slot, name, node, number, path)

    def _wait_for_node(self, device: BlockDevice, address: str, deadline: Deadline) -> None:
        ready = self._uevents.wait_until(
            lambda: _is_ready(device) or None, address, deadline, look_again=_NODE_LOOK_AGAIN
        )
        if not ready:
            raise RequestError(
                f"{device}: no {device.node} that can be opened and is device {device.number} "
                f"within {deadline.seconds:g} s",
                HResult.TIMEOUT,
            )

    def _wait_for_partition(
        self, disk: BlockDevice, partition: int, address: str, deadline: Deadline
    ) -> BlockDevice:
        """Wait until it shows, or until the kernel has read the table and it is not in it."""
        grace = Deadline(min(_PARTITION_GRACE, deadline.remaining()))
        sysfs = disk.sysfs[len(self._kernel.sys) :]

        def look() -> BlockDevice | bool | None:
            complete = self._uevents.was_announced(sysfs) or not grace.remaining()
            deadline.remaining()
            return self._partition(disk, partition) or (False if complete else None)

        found = self._uevents.wait_until(look, address, deadline)
        if isinstance(found, BlockDevice):
            return found
        others = holders.partitions(self._kernel, disk.sysfs)
        raise RequestError(
            f"{disk} has no partition {partition}; "
            + (f"it has {', '.join(others)}" if others else "it has none"),
            HResult.NOT_FOUND,
        )


def _is_ready(device: BlockDevice) -> bool:
    try:
        status = os.stat(device.node)
        if not stat.S_ISBLK(status.st_mode) or device.number != (
            f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        ):
            return False
        os.close(os.open(device.node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            return False
        raise RequestError(f"{device}: {device.node} cannot be opened: {words(error)}") from error
    return True


def _delete(device: str) -> None:
    """Write to `delete`, which returns when it is done; a dead disk can put that off.

    Events do not say when: the kernel announces a removal before sysfs shows it.
    """
    with contextlib.suppress(OSError):  # what counts is whether the device is gone
        file = os.open(os.path.join(device, "delete"), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(file, b"1\n")
        finally:
            os.close(file)
