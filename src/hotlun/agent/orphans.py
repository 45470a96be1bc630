"""Programs that outlive the agent that has started them: known by a lock that they carry.

An agent can be killed while mkfs or cryptsetup is at work, and that goes on. What it
does to the disk comes after whatever the next agent would have found there. So each
program inherits, without knowing, a descriptor of the device's node with a lock on it,
which ends when the program and all that it has started have ended, however they do.

All that can be there is older than this agent, but for what it has started itself. So once
/proc/locks shows none, only the latter is looked for.

The lock is one of an open file description (fcntl(2), Linux 3.15). udev, and some makers
of filesystems, use flock(2) on these nodes; the two do not meet.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import time
from typing import TYPE_CHECKING

from hotlun.agent import holders
from hotlun.agent.errors import RequestError
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotlun.agent.block_devices import BlockDevice
    from hotlun.agent.kernel import Kernel
    from hotlun.agent.uevents import Deadline

_GET_LOCK, _SET_LOCK = 36, 37
"""F_OFD_GETLK and F_OFD_SETLK."""

_LOCK = struct.Struct("@hhqqi")
"""struct flock: type, whence, start, length (0 for all), process (0)."""

_LISTED = r"(?m)OFDLCK +\S+ +READ .* 0 EOF$"
"""Such a lock in /proc/locks (fs/locks.c: lock_get_status)."""

_marked: set[str] = set()
"""The nodes that this process has marked, for as long as it runs."""

_LOOK_AGAIN = 0.05
"""Seconds between looks: the end of another's child is not announced."""


@contextlib.contextmanager
def marked(node: str) -> Iterator[tuple[int, ...]]:
    """Descriptors for a program to inherit that is to work on a device; for `wait_for`."""
    _marked.add(node)
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


class Orphans:
    """The programs that an agent before this one has left at work. Safe for many threads."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._are_any = True

    def are_any(self) -> bool:
        """Whether there may be any, on whatever device; asked until there are none."""
        if self._are_any:
            try:
                locks = self._kernel.read(os.path.join(self._kernel.proc, "locks"))
            except OSError:
                return True
            self._are_any = re.search(_LISTED, locks) is not None
        return self._are_any

    def wait_for(self, device: BlockDevice, deadline: Deadline) -> None:
        """Return when no program is at work on a device that this or another agent has started.

        Raises:
            RequestError: one still is at the deadline.
        """
        if device.node not in _marked and not self.are_any():
            return
        while _is_marked(device.node):
            remaining = deadline.remaining()
            if not remaining:
                by = holders.openers(self._kernel, device.sysfs)
                raise RequestError(
                    f"{device}: a program that was started for an earlier request is still at "
                    f"work on it after {deadline.seconds:g} s: "
                    + ("; ".join(by) or "it shows nowhere"),
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
