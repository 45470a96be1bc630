"""Which of the guest's SCSI hosts is the controller that the host numbers from 0.

The kernel numbers its hosts as drivers find them, and counts other adapters too,
so the number alone says nothing. On Hyper-V the host gives each controller a GUID
that is known beforehand, and VMBus shows it in sysfs. Under QEMU the controllers
are virtio devices, told apart by their place on the PCI bus, lowest address first.

Controllers come and go so seldom that what was found is remembered, and proved by one
look each time.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from hotlun.agent.errors import RequestError
from hotlun.agent.kernel import check_absent
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from hotlun.agent.kernel import Kernel

    _Bound = dict[str, int]

VMBUS_GUIDS = (
    "df6d0690-79e5-55b6-a5ec-c1e2f77f580a",
    "0110f83b-de10-5172-a266-78bca56bf50a",
    "b5d2d8d4-3a75-51bf-945b-3444dc6b8579",
    "305891a9-b251-5dfe-91a2-c25d9212275b",
)
"""hcsshim's `ScsiControllerGuids`: version-5 UUIDs of "0" to "3"."""

_PCI = r"([0-9a-f]{4,}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])"


class NoControllerError(RequestError):
    """The guest has no such controller, so it has no disk on it either."""


class _Found(NamedTuple):
    """A controller's SCSI host, and what proves that it is that still.

    Args:
        path: of the host below its device.
        bound: what the driver had when it was found (`_bound`); None where the path says all.
    """

    number: int
    path: str
    bound: _Bound | None


class Controllers:
    """The SCSI hosts that are the controllers which the host counts. Safe for many threads."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._driver = f"{kernel.sys}/bus/virtio/drivers/virtio_scsi"
        self._found: dict[int, _Found] = {}

    def scsi_host(self, controller: int) -> int:
        """The number of the SCSI host that is this controller.

        Raises:
            NoControllerError: the guest has no such controller (now).
        """
        found = self._found.get(controller)
        if found is None or not self._is_so(found):
            found = self._found[controller] = self._look_for(controller)
        return found.number

    def _is_so(self, found: _Found) -> bool:
        """Whether it is as it was.

        A GUID is one controller's for ever, and its host is below it. As to virtio, the order
        counts, and a driver that lets a device go and takes it again makes another link.
        """
        if found.bound is None:
            return self._kernel.exists(found.path)
        return self._bound() == found.bound

    def _look_for(self, controller: int) -> _Found:
        vmbus = f"{self._kernel.sys}/bus/vmbus/devices"
        present = {guid.lower(): guid for guid in self._kernel.names(vmbus)}
        bound = None
        devices: list[str | None] = [
            f"{vmbus}/{present[guid]}" if guid in present else None for guid in VMBUS_GUIDS
        ]
        if not any(devices):
            bound = self._bound()
            devices = [*self._in_order(bound)]
        path = devices[controller] if controller < len(devices) else None
        for name in self._kernel.names(path, "host") if path is not None else ():
            number = _number(name, "host")
            if number is not None:
                return _Found(number, f"{path}/{name}", bound)
        known = [str(n) for n, device in enumerate(devices) if device is not None]
        raise NoControllerError(
            f"this guest has no SCSI controller {controller}; "
            + (f"it has {', '.join(known)}" if known else "it has none at all"),
            HResult.NOT_FOUND,
        )

    def _bound(self) -> _Bound:
        """What is in the driver's directory: names, and inodes, which sysfs gives to no others."""
        try:
            with os.scandir(self._driver) as entries:
                return {entry.name: entry.inode() for entry in entries}
        except OSError as error:
            check_absent(error)
            return {}

    def _in_order(self, bound: _Bound) -> list[str]:
        """The links to the devices."""
        links = [f"{self._driver}/{name}" for name in bound if _number(name, "virtio") is not None]
        paths = {os.readlink(link): link for link in links}
        return [paths[device] for device in sorted(paths, key=_bus_address)]


def _bus_address(device: str) -> tuple[list[int], int]:
    """Order by the PCI address of the device itself; without one, by its number."""
    _, parent, name = device.rsplit("/", 2)
    number = int(name[len("virtio") :])
    address = re.fullmatch(_PCI, parent)
    if address is None:
        return [1 << 32], number
    return [int(part, 16) for part in address.groups()], number


def _number(name: str, kind: str) -> int | None:
    """Of the device that has this name; None for what is of another kind."""
    digits = name[len(kind) :]
    return int(digits) if name.startswith(kind) and digits.isdecimal() else None
