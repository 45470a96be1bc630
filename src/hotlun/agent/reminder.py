"""Has the kernel see to a disk that is waited for and that nobody would tell of.

Mostly there is nothing to do but wait: a disk's coming is announced. It is not, though,

* if the SCSI device is there without the driver of disks. It has that no more if an agent
  was killed that had begun to let it go, and the kernel looks for no driver again, nor for
  a device at an address where it has one;
* if the kernel has missed that it came. Of the disks that took the place of others it
  may have heard only that those went (virtio-scsi with its eight buffers, Linux 6.1): it
  looks for all that it has missed before it takes those away. Or an agent was killed that
  had let a stale device go, and not had the new one looked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotlun.agent.kernel import Kernel
    from hotlun.agent.orders import Orders
    from hotlun.agent.uevents import Deadline


class Reminder:
    """For one who waits for the disk at an address; it is told of each time that none was there.

    Args:
        address: as `2:0:0:1`.
        deadline: when to give up waiting for the kernel.
    """

    def __init__(self, kernel: Kernel, orders: Orders, address: str, deadline: Deadline) -> None:
        self._kernel = kernel
        self._orders = orders
        self._address = address
        self._deadline = deadline
        self._is_first = True
        self._has_bound = False

    def remind(self, device: str | None) -> bool:
        """See to it if that is due; whether another look may show the disk.

        Args:
            device: the SCSI device's directory in sysfs, if there is one.

        Raises:
            RequestError: nobody waits for the answer any more.
        """
        is_first, self._is_first = self._is_first, False
        if device is None:
            if is_first or not self._deadline.remaining():  # it is to come, or it is too late
                return False
            self._orders.look_for(self._address, self._deadline)
            return True
        if self._has_bound or self._kernel.exists(f"{device}/driver"):  # that looks at it
            return False
        self._has_bound = True
        self._orders.bind(device, self._deadline)
        return True
