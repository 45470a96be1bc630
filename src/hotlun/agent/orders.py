"""What the kernel is told about SCSI devices: let one go, look for one, take one, ask one again.

Each is a file in sysfs, written to. That returns when it is done, and for a disk that
does not answer any more it can take minutes, so that a thread of its own does it.

To let one go takes two: its driver first, then the device. The kernel deletes the devices
of a controller one after another (`scan_mutex` in `scsi_remove_device`), and most of the
time a disk's driver waits for an RCU grace period (`blk_mq_freeze_queue_wait` in
`del_gendisk`, Linux 6.1). When the drivers are unbound before, those waits overlap: 64 disks
are gone in a third of the time.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from typing import TYPE_CHECKING

from hotlun.agent.kernel import check_absent

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotlun.agent.kernel import Kernel
    from hotlun.agent.threads import Threads
    from hotlun.agent.uevents import Deadline, Uevents

_DRIVER = "bus/scsi/drivers/sd"
"""That of disks, in sysfs."""


class Orders:
    """Gives them. Safe for many threads.

    Args:
        uevents: hears of removed devices; listening already.
        threads: to write in.
    """

    def __init__(self, kernel: Kernel, uevents: Uevents, threads: Threads) -> None:
        self._kernel = kernel
        self._uevents = uevents
        self._threads = threads

    def delete(
        self,
        device: str,
        wanted: Callable[[], bool],
        deadline: Deadline,
        first: Callable[[], None] | None = None,
    ) -> bool:
        """Have a device let go; whether it is gone in time, with all that is below it in sysfs.

        Args:
            device: its directory in sysfs.
            wanted: whether the device is still the one that is to go. That is asked with
                `delete` open, which does not reach another device that has the same path.
            deadline: when to give up waiting.
            first: is done before, by the thread that tells the kernel, which it does not if
                that fails or is not done in time.

        Raises:
            RequestError: from `first`.
        """
        inode = _inode(device)
        file = _opened(os.path.join(device, "delete"))
        if file is not None:
            is_wanted = False
            try:
                is_wanted = wanted()
            finally:
                if not is_wanted:
                    os.close(file)
            if not is_wanted:
                return True
            self._have_done(file, lambda: self._delete(file, device, inode), deadline, first)

        def look() -> bool | None:
            """Events do not say: the kernel announces a removal before sysfs shows it."""
            return None if inode and _inode(device) == inode else True

        return bool(self._uevents.wait_until(look, os.path.basename(device), deadline))

    def ask_again(self, device: str, deadline: Deadline) -> None:
        """Have the kernel ask a device for its serial and its size, not for its partitions."""
        file = _opened(os.path.join(device, "rescan"))
        if file is not None:
            self._have_done(file, lambda: _write(file, b"1\n"), deadline)

    def bind(self, device: str, deadline: Deadline) -> None:
        """Have the driver of disks take a device; nothing happens to one that has a driver.

        If that is just being bound, or unbound, this waits for it (the device's lock).
        """
        file = self._driver("bind")
        if file is not None:
            address = os.path.basename(device).encode()
            self._have_done(file, lambda: _write(file, address), deadline)

    def take_up(self) -> None:
        """As `bind`, for each device without a driver, and without waiting for any.

        An agent that was killed between a disk's driver and its device has left it so.
        """
        devices = f"{self._kernel.sys}/bus/scsi/devices"
        for name in self._kernel.names(devices):
            if ":0:0:" in name and not self._kernel.exists(f"{devices}/{name}/driver"):
                self._threads.run(functools.partial(self._tell_driver, "bind", name))

    def look_for(self, address: str, deadline: Deadline) -> None:
        """Have the kernel look for a device at an address, `2:0:0:1`, where it knows of none."""
        host, place = address.split(":", 1)
        file = _opened(os.path.join(self._kernel.sys, f"class/scsi_host/host{host}/scan"))
        if file is not None:
            order = place.replace(":", " ").encode() + b"\n"
            self._have_done(file, lambda: _write(file, order), deadline)

    def _delete(self, file: int, device: str, inode: int) -> None:
        """Take a device's driver from it, and let it go by its `delete`, which is open."""
        with contextlib.suppress(OSError):  # short of memory, say: without this it goes, too
            self._unbind(device, inode)
        _write(file, b"1\n")

    def _unbind(self, device: str, inode: int) -> None:
        """Take the driver of disks from a device, if that is still the one at its address."""
        address = os.path.basename(device)
        if _inode(device) == inode:
            self._tell_driver("unbind", address)
            if _inode(device) not in (inode, 0):  # another has just come, and lost its driver
                self._tell_driver("bind", address)

    def _tell_driver(self, order: str, address: str) -> None:
        file = self._driver(order)
        if file is not None:
            try:
                _write(file, address.encode())
            finally:
                os.close(file)

    def _driver(self, order: str) -> int | None:
        """The descriptor by which the driver of disks is told what to do; None without one."""
        return _opened(os.path.join(self._kernel.sys, _DRIVER, order))

    def _have_done(
        self,
        file: int,
        order: Callable[[], None],
        deadline: Deadline,
        first: Callable[[], None] | None = None,
    ) -> None:
        """Have an order given that needs the file, and close that; wait until the deadline."""
        failed: list[Exception] = []
        given_up: list[bool] = []
        over = threading.Lock()
        over.acquire()

        def give() -> None:
            try:
                if first is not None:
                    first()
                if not given_up:
                    order()
            except Exception as error:  # of `first`, and it is the other thread's
                failed.append(error)
            finally:
                os.close(file)
                over.release()

        try:
            self._threads.run(give)
        except RuntimeError:
            os.close(file)
            raise
        try:
            over.acquire(timeout=deadline.remaining())
        finally:
            given_up.append(True)
        if failed:
            raise failed[0]


def _write(file: int, order: bytes) -> None:
    """Tell the kernel something about a device, which may be gone."""
    with contextlib.suppress(OSError):
        os.write(file, order)


def _opened(path: str) -> int | None:
    """An attribute's descriptor; None if its device is gone."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        check_absent(error)
        return None


def _inode(path: str) -> int:
    """Which directory it is; 0 if there is none."""
    try:
        return os.stat(path).st_ino
    except OSError as error:
        check_absent(error)
        return 0
