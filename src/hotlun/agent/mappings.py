"""The mapped devices over (a partition of) a disk: what each is called, and how all are closed.

The name says the slot, the partition and the layer. So one that a predecessor of this
agent left, killed between two steps, is found by the next request about the same disk,
and closed; nothing has to be remembered for that.

What is remembered spares questions: once an agent has seen that those before it have left
no mapped device, and no program that could make one, there are its own alone.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from hotlun.agent import holders
from hotlun.agent.block_devices import BlockDevice
from hotlun.agent.errors import RequestError, words
from hotlun.agent.kernel import check_absent
from hotlun.agent.orphans import Orphans
from hotlun.agent.uevents import Deadline
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from hotlun.agent.devmapper import DeviceMapper
    from hotlun.agent.kernel import Kernel
    from hotlun.agent.settings import Slot
    from hotlun.agent.uevents import Uevents

_LOOK_AGAIN = 0.05
"""Seconds between attempts to close a device that is in use; its last close is not announced."""

_PROGRAM_PATIENCE = 10.0
"""Seconds for a program that an agent before this one has started to come to its end."""


class Layers(NamedTuple):
    """The names that mapped devices over this partition have, the outermost first."""

    crypt: str
    luks: str
    verity: str
    integrity: str

    @classmethod
    def over(cls, slot: Slot, partition: int) -> Layers:
        return cls(*(f"{_stem(slot)}{partition}-{layer}" for layer in cls._fields))


_OURS = "hotlun-"


def _stem(slot: Slot) -> str:
    return f"{_OURS}{slot.controller}-{slot.lun}-p"


class Mappings:
    """Finds and closes the layers of a partition.

    Args:
        uevents: hears of removed devices; listening already.
    """

    def __init__(self, kernel: Kernel, mapper: DeviceMapper, uevents: Uevents) -> None:
        self.mapper = mapper
        self.orphans = Orphans(kernel)
        self._kernel = kernel
        self._uevents = uevents
        self._used: set[Slot] = set()
        self._are_older = True
        """Whether there may be some that are not this agent's."""

    def expect(self, slot: Slot) -> None:
        """Look for the layers of a slot from now on: there are to be some."""
        self._used.add(slot)

    def top(self, slot: Slot, partition: int) -> BlockDevice | None:
        """The device that is to be used, if the partition has any layer now."""
        for name in self._names(slot, partition):
            number = self.mapper.find(name)
            if number is not None:
                with contextlib.suppress(RequestError):  # it never got a table
                    return self.device(slot, number)
        return None

    def lies_over(self, mapped: BlockDevice, device: BlockDevice) -> bool:
        """Whether a mapped device's lowest layer is on this device, and not on one of before."""
        path = mapped.sysfs
        while True:
            below = self._kernel.names(os.path.join(path, "slaves"))
            if not below:
                break
            try:
                path = self._kernel.target(os.path.join(path, "slaves", below[0]))
            except OSError as error:
                check_absent(error)
                return False
        return path == device.sysfs

    def device(self, slot: Slot, number: str) -> BlockDevice:
        """A mapped device as everything else takes devices.

        Raises:
            RequestError: it is gone again.
        """
        try:
            path = self._kernel.target(os.path.join(self._kernel.sys, "dev/block", number))
        except OSError as error:
            raise RequestError(f"the mapped device {number} is gone: {words(error)}") from error
        name = os.path.basename(path)
        return BlockDevice(slot, name, os.path.join(self._kernel.dev, name), number, path)

    def close(self, slot: Slot, partition: int, deadline: Deadline, *, lazy: bool = False) -> None:
        """Remove every layer that there is, the outermost first.

        Args:
            deadline: how long a device in use may take to become free; if it is by a program
                that an earlier agent has started, that has longer.
            lazy: do not wait: the kernel removes what is in use when its last user is gone.

        Raises:
            RequestError: one is in use, and by whom.
        """
        for name in self._names(slot, partition):
            number = self.mapper.find(name)
            if number is None or self._remove(name):
                continue
            if lazy:
                self.mapper.remove(name, deferred=True)
            else:
                self._close_busy(name, self.device(slot, number), deadline)

    def close_unused(self, slot: Slot, deadline: Deadline, partition: int | None = None) -> None:
        """Remove the layers that nothing uses, of one partition or of all; others stay.

        Of one partition what verifies it stays, too: a link may lead to it, and leaves no
        trace in the kernel.

        Args:
            deadline: how long they may take to become unused.

        Raises:
            RequestError: the kernel cannot be asked.
        """

        def look() -> bool | None:
            left = [
                name
                for name in self._names(slot, partition)
                if (partition is None or not name.endswith("-verity")) and not self._remove(name)
            ]
            return None if left else True

        self._uevents.wait_until(look, "", deadline, look_again=_LOOK_AGAIN)

    def _names(self, slot: Slot, partition: int | None) -> list[str]:
        """Of the layers that there are, the outermost first; mostly there is none."""
        if not self._are_older and slot not in self._used:
            return []
        # Asked first: the last thing that an orphan does may be to make one.
        are_orphans = self._are_older and self.orphans.are_any()
        ours = self.mapper.names(_OURS)
        self._are_older = self._are_older and (are_orphans or bool(ours))
        stem = _stem(slot) + ("" if partition is None else f"{partition}-")
        found = [name for name in ours if name.startswith(stem)]
        return [
            name for layer in Layers._fields for name in found if name.rpartition("-")[2] == layer
        ]

    def _remove(self, name: str) -> bool:
        """Whether the device is gone, with the node that cryptsetup makes where there is no udev.

        The node goes first: of an agent that is killed between the two, the next one
        finds what is left by the device.
        """
        path = os.path.join(self._kernel.dev, "mapper", name)
        with contextlib.suppress(OSError):
            if stat.S_ISBLK(os.lstat(path).st_mode):  # udev's are links, and udev removes them
                os.unlink(path)
        return self.mapper.remove(name)

    def _close_busy(self, name: str, device: BlockDevice, deadline: Deadline) -> None:
        self.orphans.wait_for(device, Deadline(_PROGRAM_PATIENCE))
        removed = self._uevents.wait_until(
            lambda: self.mapper.remove(name) or None,
            device.name,
            deadline,
            look_again=_LOOK_AGAIN,
        )
        if not removed:
            users = holders.users(self._kernel, device.sysfs)
            raise RequestError(
                f"{device}: {name} cannot be closed, it is in use: "
                + ("; ".join(users) or "something in the kernel, or a process"),
                HResult.INVALID_STATE,
            )
