"""Programs that outlive the agent that has started them: known by a lock that they carry.

An agent can be killed while mkfs or cryptsetup is at work, and that goes on. What it
does to the disk comes after whatever the next agent would have found there. So each
program inherits, without knowing, a descriptor of the device's node with a lock on it,
which ends when the program and all that it has started have ended, however they do.

The lock is one of an open file description (fcntl(2), Linux 3.15). udev, and some makers
of filesystems, use flock(2) on these nodes; the two do not meet.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from typing import TYPE_CHECKING

from hotlun.agent import holders
from hotlun.agent.errors import RequestError
from hotlun.bridge.messages import HResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotlun.agent.kernel import Kernel
    from hotlun.agent.scsi import BlockDevice
    from hotlun.agent.uevents import Deadline

_GET_LOCK, _SET_LOCK = 36, 37
"""F_OFD_GETLK and F_OFD_SETLK."""

_LOCK = struct.Struct("@hhqqi")
"""struct flock: type, whence, start, length (0 for all), process (0)."""

_LOOK_AGAIN = 0.05
"""Seconds between looks: the end of another's child is not announced."""


@contextlib.contextmanager
def marked(node: str) -> Iterator[tuple[int, ...]]:
    """Descriptors for a program to inherit that is to work on a device; for `wait_for`."""
    try:
        file = _open(node)
    except OSError:  # the program will say so
        yield ()
        return
    try:
        with contextlib.suppress(OSError):  # without such locks nobody can be told
            fcntl.fcntl(file, _SET_LOCK, _LOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
        yield (file,)
    finally:
        os.close(file)


def wait_for(kernel: Kernel, device: BlockDevice, deadline: Deadline) -> None:
    """Return when no program is at work on a device that this or another agent has started.

    Raises:
        RequestError: one still is at the deadline.
    """
    while _is_marked(device.node):
        remaining = deadline.remaining()
        if not remaining:
            raise RequestError(
                f"{device}: a program that was started for an earlier request is still at work "
                f"on it after {deadline.seconds:g} s: "
                + ("; ".join(holders.openers(kernel, device.sysfs)) or "it shows nowhere"),
                HResult.TIMEOUT,
            )
        time.sleep(min(_LOOK_AGAIN, remaining))


def _is_marked(node: str) -> bool:
    try:
        file = _open(node)
    except OSError:  # nothing can be at work on it now
        return False
    try:
        wanted = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        found = fcntl.fcntl(file, _GET_LOCK, wanted)
    except OSError:
        return False
    finally:
        os.close(file)
    return bool(_LOCK.unpack_from(found)[0] != fcntl.F_UNLCK)


def _open(node: str) -> int:
    return os.open(node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
