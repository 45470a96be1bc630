"""A disk's partitions, as the kernel has them.

It read the table when it found the disk. Whoever writes one later, in this guest or
at another attachment of the disk, has to have it read again.
"""

from __future__ import annotations

import errno
import fcntl
from typing import TYPE_CHECKING

from hotlun.agent.kernel import check_absent

if TYPE_CHECKING:
    from hotlun.agent.kernel import Kernel

_BLKRRPART = 0x125F


def find(kernel: Kernel, disk: str, number: int) -> str | None:
    """The directory in sysfs of the disk's partition with this number.

    The number is the kernel's own word. The name is made of it by a rule (`sda1`, but
    `nvme0n1p1` after a digit) that is not worth repeating.

    Args:
        disk: its directory in sysfs.
    """
    for name in _candidates(kernel, disk):
        path = f"{disk}/{name}"
        try:
            if kernel.attribute(f"{path}/partition") == str(number):
                return path
        except OSError as error:
            check_absent(error)
    return None


def names(kernel: Kernel, disk: str) -> list[str]:
    """The names of a disk's partitions, which the kernel shows as directories in its own."""
    return [name for name in _candidates(kernel, disk) if kernel.exists(f"{disk}/{name}/partition")]


def read_table(disk: int) -> bool:
    """Have the kernel read a disk's table now; whether it has, as it does not in use.

    Its first reading, if that is not over, comes before (the disk's `open_mutex`).

    Args:
        disk: a descriptor of the whole disk.

    Raises:
        OSError: the table cannot be read.
    """
    try:
        fcntl.ioctl(disk, _BLKRRPART)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        if error.errno != errno.EINVAL:  # that is a disk without partitions, as some loops are
            raise
    return True


def _candidates(kernel: Kernel, disk: str) -> list[str]:
    """What has a partition's name, of some thirty attributes of the disk."""
    return kernel.names(disk, disk.rpartition("/")[2])
