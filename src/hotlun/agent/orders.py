"""What the kernel is told about SCSI devices: let one go, look for one, ask one again.

Each is a file in sysfs, written to. That returns when it is done, and for a disk that
does not answer any more it can take minutes, so that a thread of its own does it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

from hotlun.agent.kernel import check_absent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hotlun.agent.kernel import Kernel
    from hotlun.agent.threads import Threads
    from hotlun.agent.uevents import Deadline, Uevents


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
        shown: Sequence[str],
        wanted: Callable[[], bool],
        deadline: Deadline,
        first: Callable[[], None] | None = None,
    ) -> bool:
        """Have a device let go; whether it is gone in time.

        Args:
            device: its directory in sysfs.
            shown: other directories that go with it.
            wanted: whether the device is still the one that is to go. That is asked with
                `delete` open, which does not reach another device that has the same path.
            deadline: when to give up waiting.
            first: is done before, by the thread that tells the kernel, which it does not if
                that fails or is not done in time.

        Raises:
            RequestError: from `first`.
        """
        inodes = [(path, _inode(path)) for path in (device, *shown)]
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
            self._write(file, b"1\n", deadline, first)

        def look() -> bool | None:
            """Events do not say: the kernel announces a removal before sysfs shows it."""
            return None if any(_inode(path) == inode for path, inode in inodes if inode) else True

        return bool(self._uevents.wait_until(look, os.path.basename(device), deadline))

    def ask_again(self, device: str, deadline: Deadline) -> None:
        """Have the kernel ask a device for its serial and its size, not for its partitions."""
        file = _opened(os.path.join(device, "rescan"))
        if file is not None:
            self._write(file, b"1\n", deadline)

    def look_for(self, address: str, deadline: Deadline) -> None:
        """Have the kernel look for a device at an address, `2:0:0:1`, where it knows of none."""
        host, place = address.split(":", 1)
        file = _opened(os.path.join(self._kernel.sys, f"class/scsi_host/host{host}/scan"))
        if file is not None:
            self._write(file, place.replace(":", " ").encode() + b"\n", deadline)

    def _write(
        self,
        file: int,
        order: bytes,
        deadline: Deadline,
        first: Callable[[], None] | None = None,
    ) -> None:
        """Write to an attribute and close it; wait for that until the deadline at most."""
        failed: list[Exception] = []
        given_up: list[bool] = []
        over = threading.Lock()
        over.acquire()

        def write() -> None:
            try:
                if first is not None:
                    first()
                if not given_up:
                    with contextlib.suppress(OSError):  # its device is gone
                        os.write(file, order)
            except Exception as error:  # that of `first`, which is the other thread's
                failed.append(error)
            finally:
                os.close(file)
                over.release()

        try:
            self._threads.run(write)
        except RuntimeError:
            os.close(file)
            raise
        try:
            over.acquire(timeout=deadline.remaining())
        finally:
            given_up.append(True)
        if failed:
            raise failed[0]


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
