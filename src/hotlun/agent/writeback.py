"""What was written to a disk and is in the guest's memory yet: it is written before the disk goes.

The kernel does that when the last who had the disk open closes it. One who closes it
while it is claimed is not the last. And it would do it when it lets go of the disk,
but then the SCSI device is told first to take nothing any more (`scsi_remove_device`,
Linux 6.1): the data is lost, and nobody is told.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from hotlun.agent import partitions, syscalls
from hotlun.agent.errors import RequestError, words
from hotlun.agent.kernel import check_absent
from hotlun.bridge.messages import HResult

if TYPE_CHECKING:
    from hotlun.agent.kernel import Kernel
    from hotlun.agent.scsi import BlockDevice
    from hotlun.agent.uevents import Deadline


def write_back(kernel: Kernel, disk: BlockDevice, deadline: Deadline) -> None:
    """Have it written, to the disk and to its partitions, whose memory is another.

    A disk that does not answer can take minutes, so that a thread of its own does it.

    Raises:
        RequestError: it cannot be written, of which there is one error; or is not in time.
    """
    files: list[int] = []
    failed: list[OSError] = []

    def write() -> None:
        for file in files:
            try:
                syscalls.write_back(file)
            except OSError as error:
                failed.append(error)
            finally:
                os.close(file)

    try:
        for name in (disk.name, *partitions.names(kernel, disk.sysfs)):
            files += _opened(os.path.join(kernel.dev, name))
        writing = threading.Thread(target=write, name="write back", daemon=True)
        writing.start()
    except BaseException:
        for file in files:
            os.close(file)
        raise
    writing.join(deadline.remaining())
    if writing.is_alive():
        raise RequestError(
            f"{disk}: what was written to it is still in the guest's memory "
            f"after {deadline.seconds:g} s; it was not let go",
            HResult.TIMEOUT,
        )
    if failed:
        raise RequestError(
            f"{disk}: something that was written to it is lost, as it could not be brought from "
            f"the guest's memory to the disk: {words(failed[0])}; it was not let go, and is "
            "when that is asked for again"
        )


def _opened(node: str) -> list[int]:
    """A node's descriptor; none if it is gone."""
    try:
        return [os.open(node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)]
    except OSError as error:
        check_absent(error)
        return []
