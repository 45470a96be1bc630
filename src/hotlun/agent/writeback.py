"""What was written to a disk and is in the guest's memory yet: it is written before the disk goes.

The kernel does that when the last who had the disk open closes it. One who closes it
while it is claimed is not the last. And it would do it when it lets go of the disk,
but then the SCSI device is told first to take nothing any more (`scsi_remove_device`,
Linux 6.1): the data is lost, and nobody is told.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hotlun.agent import partitions, syscalls
from hotlun.agent.errors import RequestError, words
from hotlun.agent.kernel import check_absent

if TYPE_CHECKING:
    from hotlun.agent.block_devices import BlockDevice
    from hotlun.agent.kernel import Kernel


def write_back(kernel: Kernel, disk: BlockDevice) -> None:
    """Have it written, to the disk and to its partitions, whose memory is another.

    For a disk that does not answer that can take minutes.

    Raises:
        RequestError: it cannot be, of which there is one error.
    """
    for name in (disk.name, *partitions.names(kernel, disk.sysfs)):
        file = _opened(f"{kernel.dev}/{name}")
        if file is None:
            continue
        try:
            syscalls.write_back(file)
        except OSError as error:
            raise RequestError(
                f"{disk}: something that was written to it is lost, as it could not be brought "
                f"from the guest's memory to the disk: {words(error)}; it was not let go, and is "
                "when that is asked for again"
            ) from error
        finally:
            os.close(file)


def _opened(node: str) -> int | None:
    """A node's descriptor; None if it is gone."""
    try:
        return os.open(node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        check_absent(error)
        return None
