"""Having a disk for oneself, so that nothing can begin to use it.

An exclusive open fails while anything in the kernel holds the disk or a partition of
it, in whatever namespace, and what would hold it fails while it is open. A loop
device on it is the exception: it holds its file, and be that a disk, like any process.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from hotlun.agent import holders
from hotlun.agent.errors import RequestError
from hotlun.agent.kernel import check_absent
from hotlun.bridge.messages import HResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotlun.agent.kernel import Kernel
    from hotlun.agent.openers import Openers
    from hotlun.agent.scsi import BlockDevice
    from hotlun.agent.uevents import Deadline, Uevents

_LOOK_AGAIN = 0.05
"""Seconds between tries: the kernel does not announce that it has let go of a disk."""

_LOOK_AT_PROCESSES_AGAIN = 0.2
"""Seconds between looks at all processes, each of which costs milliseconds."""


class InUseError(RequestError):
    """Something else uses the disk.

    Args:
        users: who, in words.
    """

    def __init__(self, disk: BlockDevice, users: list[str]) -> None:
        users = users or ["something in the kernel, or a process for itself alone"]
        super().__init__(f"{disk} is in use: {'; '.join(users)}", HResult.INVALID_STATE)
        self.users = "; ".join(users)


@contextlib.contextmanager
def claimed(
    kernel: Kernel, uevents: Uevents, disk: BlockDevice, deadline: Deadline
) -> Iterator[int | None]:
    """Hold the disk for the length of the block; gives its descriptor.

    Without a node that can be opened, as when the disk is dying, that is None, and
    all that can be said is that nothing is known to use it.

    Args:
        deadline: when to give up waiting for others to let go of it.

    Raises:
        InUseError: others use it.
    """

    def look() -> int | OSError | None:
        try:
            claim = _open(disk)
        except OSError as error:
            check_absent(error)
            return None if error.errno == errno.EBUSY else error
        is_free = False
        try:
            is_free = not any(holders.loops(kernel, disk.sysfs))
        finally:
            if not is_free:
                os.close(claim)
        return claim if is_free else None

    claim = uevents.wait_until(look, disk.name, deadline, look_again=_LOOK_AGAIN)
    if not isinstance(claim, int):
        users = holders.users(kernel, disk.sysfs)
        if users or claim is None:
            raise InUseError(disk, users)
        yield None
        return
    try:
        yield claim
    finally:
        os.close(claim)


def wait_for_processes(
    openers: Openers, uevents: Uevents, disk: BlockDevice, deadline: Deadline
) -> None:
    """Return when no process has the disk or a partition of it open, which a claim allows.

    Not found is who has only mapped it, or sent the descriptor to where nobody has received
    it yet, or is one of too many to be looked at.

    Raises:
        InUseError: one still has at the deadline.
    """
    users: list[str] = []

    def look() -> bool | None:
        users[:] = openers.of(disk.sysfs)
        return None if users else True

    if not uevents.wait_until(look, disk.name, deadline, look_again=_LOOK_AT_PROCESSES_AGAIN):
        raise InUseError(disk, users)


def _open(disk: BlockDevice) -> int:
    """Open it exclusively.

    Raises:
        OSError: it is in use (EBUSY), or its node is not there, or none of this device.
    """
    claim = os.open(disk.node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)
    if disk.has_node(os.fstat(claim)):
        return claim
    os.close(claim)
    raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), disk.node)
