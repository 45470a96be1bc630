"""A block device as the guest's kernel shows it: its number, its directory, its node.

What sysfs shows comes before the node in /dev, whose making is not announced without udev.
A name is not the device's for ever: only while it is open is the name given to no other.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from hotlun.agent import partitions
from hotlun.agent.errors import RequestError, words
from hotlun.agent.kernel import check_absent
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from types import TracebackType

    from hotlun.agent.kernel import Kernel
    from hotlun.agent.settings import Slot
    from hotlun.agent.uevents import Deadline, Uevents

_LOOK_AGAIN = 0.02
"""Seconds between looks for a node."""


class BlockDevice(NamedTuple):
    """A disk or a partition: its node, its number as `8:1`, its directory in sysfs."""

    slot: Slot
    name: str
    node: str
    number: str
    sysfs: str

    def __str__(self) -> str:
        return f"disk {self.slot} ({self.name})"

    def has_node(self, status: os.stat_result) -> bool:
        """Whether that is the status of a node of this device."""
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        return stat.S_ISBLK(status.st_mode) and number == self.number


class Held:
    """A device whose disk is open until the end of a `with`, which is given the device.

    Args:
        file: the disk's descriptor.
    """

    def __init__(self, device: BlockDevice, file: int) -> None:
        self._device = device
        self._file = file

    def __enter__(self) -> BlockDevice:
        return self._device

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        os.close(self._file)


def block_device(kernel: Kernel, slot: Slot, path: str) -> BlockDevice | None:
    """The device that has this directory in sysfs, if it is there now."""
    try:
        number = kernel.attribute(f"{path}/dev")
    except OSError as error:
        check_absent(error)
        return None
    name = path.rpartition("/")[2]
    return BlockDevice(slot, name, f"{kernel.dev}/{name}", number, path)


def partition_of(kernel: Kernel, disk: BlockDevice, number: int) -> BlockDevice | None:
    """A disk's partition with this number, if the kernel has it now."""
    path = partitions.find(kernel, disk.sysfs, number)
    return block_device(kernel, disk.slot, path) if path else None


def open_node(
    kernel: Kernel, uevents: Uevents, device: BlockDevice, deadline: Deadline
) -> int | None:
    """Wait for the node, and open it; None if the device goes meanwhile.

    Raises:
        RequestError: it cannot be opened, or is not there at the deadline.
    """

    def look() -> int | None:
        file = _opened(device)
        return -1 if file is None and not kernel.exists(device.sysfs) else file

    file = uevents.wait_until(look, device.name, deadline, look_again=_LOOK_AGAIN)
    if file is None:
        raise RequestError(
            f"{device}: no {device.node} that can be opened and is device {device.number} "
            f"within {deadline.seconds:g} s",
            HResult.TIMEOUT,
        )
    return file if file >= 0 else None


def _opened(device: BlockDevice) -> int | None:
    """The node's descriptor; None if there is none yet that is this device's."""
    try:
        file = os.open(device.node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV) or _is_anothers(device):
            return None
        raise RequestError(f"{device}: {device.node} cannot be opened: {words(error)}") from error
    if device.has_node(os.fstat(file)):
        return file
    os.close(file)
    return None


def _is_anothers(device: BlockDevice) -> bool:
    """Whether the node is another device's, or there is none."""
    try:
        return not device.has_node(os.stat(device.node))
    except OSError as error:
        return error.errno == errno.ENOENT
