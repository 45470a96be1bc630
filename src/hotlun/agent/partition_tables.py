"""A partition that the kernel may not know of yet: it is had to read the table again.

That it does only while nobody uses the disk, and a reader (udev looks into what is new) is
soon gone.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hotlun.agent import holders, partitions
from hotlun.agent.block_devices import open_node, partition_of
from hotlun.agent.claims import InUseError, claimed
from hotlun.agent.errors import RequestError, words
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from hotlun.agent.block_devices import BlockDevice
    from hotlun.agent.kernel import Kernel
    from hotlun.agent.uevents import Deadline, Uevents

_PATIENCE = 1.0
"""Seconds for whoever looks into a partition to close it again."""

_LOOK_AGAIN = 0.02
"""Seconds between tries: the kernel does not announce that a partition was closed."""


def wait_for_partition(
    kernel: Kernel,
    uevents: Uevents,
    disk: BlockDevice,
    number: int,
    deadline: Deadline,
    *,
    fresh: bool,
) -> BlockDevice:
    """The partition; if the kernel knows of none, after it has read the table again.

    Args:
        fresh: have it read that in any case.

    Raises:
        RequestError: the disk has no such partition, or does not let itself be read; or the
            node is not there at the deadline.
    """
    unread = ""
    part = None if fresh else partition_of(kernel, disk, number)
    if part is None:
        unread = _read(kernel, uevents, disk, deadline)
        part = partition_of(kernel, disk, number)
    file = open_node(kernel, uevents, part, deadline) if part else None
    if part is None or file is None:
        others = partitions.names(kernel, disk.sysfs)
        raise RequestError(
            f"{disk} has no partition {number}; "
            + (f"it has {', '.join(others)}" if others else "it has none")
            + unread,
            HResult.NOT_FOUND,
        )
    os.close(file)
    return part


def _read(kernel: Kernel, uevents: Uevents, disk: BlockDevice, deadline: Deadline) -> str:
    """Have the kernel read the table now; why it cannot, in words, or `""`.

    Raises:
        RequestError: the disk does not let itself be read.
    """
    unread = "; the table on the disk may say more, but cannot be read again now: in use, "
    try:
        with claimed(kernel, uevents, disk, deadline.within(0)) as claim:
            loops = holders.loops(kernel, disk.sysfs)
            if loops:
                raise InUseError(disk, loops)
            if claim is None or uevents.wait_until(
                lambda: partitions.read_table(claim) or None,
                disk.name,
                deadline.within(_PATIENCE),
                look_again=_LOOK_AGAIN,
            ):
                return ""
            raise InUseError(disk, holders.openers(kernel, disk.sysfs))
    except InUseError as error:
        return unread + error.users
    except OSError as error:
        raise RequestError(f"{disk}: its partition table cannot be read: {words(error)}") from error
