"""Which of the guest's SCSI hosts is the controller that the host numbers from 0.

The kernel numbers its hosts as drivers find them, and counts other adapters too,
so the number alone says nothing. On Hyper-V the host gives each controller a GUID
that is known beforehand, and VMBus shows it in sysfs. Under QEMU the controllers
are virtio devices, told apart by their place on the PCI bus, lowest address first.
"""

from __future__ import annotations

import functools
import os
import re
from typing import TYPE_CHECKING

from hotlun.agent.errors import RequestError
from hotlun.bridge.messages import HResult

if TYPE_CHECKING:
    from hotlun.agent.kernel import Kernel

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


def scsi_host(kernel: Kernel, controller: int) -> int:
    """The number of the SCSI host that is this controller.

    Raises:
        NoControllerError: the guest has no such controller (now).
    """
    vmbus = os.path.join(kernel.sys, "bus/vmbus/devices")
    present = {guid.lower(): guid for guid in kernel.names(vmbus)}
    if any(guid in present for guid in VMBUS_GUIDS):
        devices = [
            os.path.join(vmbus, present[guid]) if guid in present else None for guid in VMBUS_GUIDS
        ]
    else:
        devices = [*_virtio_controllers(kernel)]
    path = devices[controller] if controller < len(devices) else None
    number = _host_below(kernel, path) if path is not None else None
    if number is None:
        known = [str(n) for n, device in enumerate(devices) if device is not None]
        raise NoControllerError(
            f"this guest has no SCSI controller {controller}; "
            + (f"it has {', '.join(known)}" if known else "it has none at all"),
            HResult.NOT_FOUND,
        )
    return number


def _virtio_controllers(kernel: Kernel) -> list[str]:
    driver = os.path.join(kernel.sys, "bus/virtio/drivers/virtio_scsi")
    names = [name for name in kernel.names(driver) if _number(name, "virtio") is not None]
    paths = [os.path.join(driver, name) for name in names]
    return _in_order(tuple((path, os.stat(path, follow_symlinks=False).st_ino) for path in paths))


@functools.lru_cache(maxsize=1)
def _in_order(links: tuple[tuple[str, int], ...]) -> list[str]:
    """The links to devices in the order of these, worked out when it can have changed.

    Args:
        links: each with its inode's number, which sysfs gives to no other link.
    """
    paths = {os.readlink(path): path for path, _ in links}
    return [paths[device] for device in sorted(paths, key=_bus_address)]


def _bus_address(device: str) -> tuple[list[int], int]:
    """Order by the PCI address of the device itself; without one, by its number."""
    _, parent, name = device.rsplit("/", 2)
    number = int(name[len("virtio") :])
    address = re.fullmatch(_PCI, parent)
    if address is None:
        return [1 << 32], number
    return [int(part, 16) for part in address.groups()], number


def _host_below(kernel: Kernel, device: str) -> int | None:
    for name in kernel.names(device):
        number = _number(name, "host")
        if number is not None:
            return number
    return None


def _number(name: str, kind: str) -> int | None:
    """Of the device that has this name; None for what is of another kind."""
    digits = name[len(kind) :]
    return int(digits) if name.startswith(kind) and digits.isdecimal() else None
