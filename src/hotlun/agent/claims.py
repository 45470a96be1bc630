"""Having a disk for oneself, so that nothing can begin to use it.

An exclusive open fails while anything in the kernel holds the disk or a partition of
it, in whatever namespace, and what would hold it fails while it is open. A loop
device on it is the exception: it holds its file, and be that a disk, like any process.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from hotlun.agent import holders
from hotlun.agent.errors import RequestError
from hotlun.agent.kernel import check_absent
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from types import TracebackType

    from hotlun.agent.block_devices import BlockDevice
    from hotlun.agent.kernel import Kernel
    from hotlun.agent.openers import Openers
    from hotlun.agent.uevents import Deadline, Uevents

_LOOK_AGAIN = 0.05
"""Seconds between tries: the kernel does not announce that it has let go of a disk."""

_LOOK_AT_OPENERS_AGAIN = 0.2
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


class Claim:
    """A disk that is held until the end of a `with`, which is given the descriptor.

    Without a node that can be opened, as when the disk is dying, that is None, and
    all that can be said is that nothing is known to use it.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> int | None:
        return self._descriptor

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def claimed(kernel: Kernel, uevents: Uevents, disk: BlockDevice, deadline: Deadline) -> Claim:
    """Have the disk for oneself alone, as far as that excludes others: see `wait_for_openers`.

    Args:
        deadline: when to give up waiting for others to let go of it.

    Raises:
        InUseError: others use it.
    """

    def look() -> int | OSError | None:
        try:
            return _open(disk)
        except OSError as error:
            check_absent(error)
            return None if error.errno == errno.EBUSY else error

    claim = uevents.wait_until(look, disk.name, deadline, look_again=_LOOK_AGAIN)
    if not isinstance(claim, int):
        users = holders.users(kernel, disk.sysfs)
        if users or claim is None:
            raise InUseError(disk, users)
        return Claim(None)
    return Claim(claim)


def wait_for_openers(
    openers: Openers, uevents: Uevents, disk: BlockDevice, deadline: Deadline
) -> None:
    """Return when no process or loop device has the disk or a partition open, as a claim allows.

    Not found is who has only mapped it, or sent the descriptor to where nobody has received
    it yet, or is one of too many to be looked at.

    Raises:
        InUseError: one still has at the deadline.
    """
    users: list[str] = []

    def look() -> bool | None:
        users[:] = openers.of(disk.sysfs)
        return None if users else True

    if not uevents.wait_until(look, disk.name, deadline, look_again=_LOOK_AT_OPENERS_AGAIN):
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
