"""Waiting for devices by what the kernel announces, never by sleeping.

One netlink socket for all who wait, as every socket gets every event: with one
each, 64 disks plugged at once would wake 64 threads for each of some 300 events.
The socket is open before anybody looks at sysfs, so what happens after a look is
always heard of.

Only block devices' events count. A disk's is the last of some six that tell of it
(`device_add_disk`, Linux 6.1: announced once its partitions are there), so that a
waiter is woken once, and then finds everything.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from typing import TYPE_CHECKING, TypeVar

from hotlun.agent.errors import AbandonedError
from hotlun.agent.event_filter import only_block_devices

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1

_RECEIVE_BUFFER = 4 << 20
_LOOK_AGAIN = 0.5
"""Seconds after which a waiter looks without having heard anything."""

_log = logging.getLogger("hotlun.agent")


class Deadline:
    """How long a request may wait: for so many seconds, and while its host is there."""

    def __init__(self, seconds: float, wanted: Callable[[], bool] = lambda: True) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._wanted = wanted

    def remaining(self) -> float:
        """Seconds left, not below 0.

        Raises:
            AbandonedError: nobody waits for the answer any more.
        """
        if not self._wanted():
            raise AbandonedError("the connection that asked for this is gone")
        return max(0.0, self._end - time.monotonic())

    def within(self, seconds: float) -> Deadline:
        """One for a part of it: so many seconds from now, or what is left if that is less."""
        return Deadline(min(seconds, self.remaining()), self._wanted)


class Watch:
    """Set or not, as `threading.Event`, but a lock is all of it.

    What an event is made of, and what its `wait` makes, takes an emulated guest longer than to
    look for a disk. So this is for one who waits, and for one at a time who sets it.
    """

    def __init__(self) -> None:
        self._unset = threading.Lock()
        self._unset.acquire()

    def set(self) -> None:
        """End the `wait` of now, or else the next."""
        if self._unset.locked():
            self._unset.release()

    def clear(self) -> None:
        """Have the next `wait` wait."""
        self._unset.acquire(blocking=False)

    def wait(self, seconds: float) -> None:
        """Return when it is set, which it is not any more then, or after so many seconds."""
        self._unset.acquire(timeout=seconds)


class Uevents:
    """Hears the kernel's events and wakes who waits for the device they are about.

    Args:
        source: gives the events, one a datagram; by default the kernel's.
    """

    def __init__(self, source: socket.socket | None = None) -> None:
        self._socket = _open_netlink() if source is None else source
        self._lock = threading.Lock()
        self._watches: dict[str, list[Watch]] = {}
        threading.Thread(target=self._listen, name="uevents", daemon=True).start()

    def wait_until(
        self,
        look: Callable[[], _T | None],
        device: str,
        deadline: Deadline,
        *,
        look_again: float = _LOOK_AGAIN,
        is_awaited: bool = False,
    ) -> _T | None:
        """Look until there is something to see, each time that something happens to `device`.

        Args:
            look: returns None while there is nothing yet; may raise.
            device: the name of a directory in sysfs, such as `2:0:0:1`: what counts is what
                happens to a block device below it.
            deadline: when to give up and return None.
            look_again: seconds after which to look without an event.
            is_awaited: there is mostly nothing yet, so that a look before the watch is set up,
                which else is mostly all, is one too many.
        """
        seen = None if is_awaited else look()
        if seen is not None:
            return seen
        changed = Watch()
        with self._lock:
            self._watches.setdefault(device, []).append(changed)
        try:
            while True:
                changed.clear()
                seen = look()
                if seen is not None:
                    return seen
                remaining = deadline.remaining()
                if not remaining:
                    return None
                changed.wait(min(remaining, look_again))
        finally:
            with self._lock:
                self._watches[device].remove(changed)
                if not self._watches[device]:
                    del self._watches[device]

    def wake_all(self) -> None:
        """Have everybody look again."""
        with self._lock:
            for watches in self._watches.values():
                for changed in watches:
                    changed.set()

    def _listen(self) -> None:
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except OSError as error:
                if error.errno == errno.ENOBUFS:  # some were lost
                    self.wake_all()
                    continue
                _log.error("no more events from the kernel: %s", error)
                return
            if not data:
                return
            self._heard(data)

    def _heard(self, data: bytes) -> None:
        """Note one event: `add@/devices/...`, then `KEY=value`s that say no more, after NULs."""
        head = data.partition(b"\0")[0].decode("utf-8", "replace")
        if "/block/" not in head:
            return
        with self._lock:
            for part in head.partition("@")[2].split("/"):
                for changed in self._watches.get(part, ()):
                    changed.set()


def _open_netlink() -> socket.socket:
    source = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_KOBJECT_UEVENT)
    # 33 is SO_RCVBUFFORCE, which Python has no name for: beyond the usual limit, for root.
    with contextlib.suppress(OSError):
        source.setsockopt(socket.SOL_SOCKET, 33, _RECEIVE_BUFFER)
    try:
        only_block_devices(source)
    except OSError as error:
        _log.info("every event wakes the agent, as the kernel takes no filter: %s", error)
    source.bind((0, _KERNEL_GROUP))
    return source
