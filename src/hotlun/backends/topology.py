"""Where disks can go in a VM: its SCSI controllers and what is on them, read from QOM.

A controller is found by its device id, and what is on it by the links that its
SCSI bus keeps to its devices; so it makes no difference which model it is, nor
whether the VM's own disks have ids.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotlun.errors import BackendError
from hotlun.model import Slot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hotlun.backends.errand import Errand
    from hotlun.backends.monitor import Monitor

_PERIPHERAL = "/machine/peripheral"
_SCSI_BUS = "child<SCSI>"
_BUS_CHILD = re.compile(r"child\[\d+\]")


@dataclass(frozen=True, slots=True)
class Controller:
    """A SCSI controller of the VM.

    Args:
        id: its QEMU device id.
        bus: the QOM path of its SCSI bus.
    """

    id: str
    bus: str

    @property
    def bus_name(self) -> str:
        """What `device_add` calls the bus."""
        return self.bus.rpartition("/")[2]


async def find_controllers(
    monitor: Monitor, errand: Errand, ids: Sequence[str]
) -> tuple[Controller, ...]:
    """The controllers with these device ids, in this order.

    Raises:
        BackendError: the VM lacks one; the message says which it has.
    """
    found = await asyncio.gather(*(_controller(monitor, errand, name) for name in ids))
    missing = [name for name, controller in zip(ids, found, strict=True) if controller is None]
    if missing:
        there = await asyncio.gather(
            *(
                _controller(monitor, errand, name)
                for name, kind in (await _members(monitor, errand, _PERIPHERAL)).items()
                if kind.startswith("child<")
            )
        )
        has = ", ".join(sorted(controller.id for controller in there if controller)) or "none"
        raise errand.error(
            BackendError,
            f"the VM has no SCSI controller {', '.join(missing)}; with an id it has: {has}. "
            "Name those, or start it with -device virtio-scsi-pci,id=...",
        )
    return tuple(controller for controller in found if controller)


async def occupied_slots(
    monitor: Monitor, errand: Errand, controllers: Sequence[Controller]
) -> frozenset[Slot]:
    """The slots on target 0 that hold a device, whoever put it there."""
    luns = await asyncio.gather(*(_luns(monitor, errand, each) for each in controllers))
    return frozenset(Slot(number, lun) for number, held in enumerate(luns) for lun in held)


async def devices_with_ids(monitor: Monitor, errand: Errand) -> frozenset[str]:
    """The ids of all devices that have one, and not of one that is on its way out for good."""
    members = await _members(monitor, errand, _PERIPHERAL)
    return frozenset(name for name, kind in members.items() if kind.startswith("child<"))


async def place_of(monitor: Monitor, errand: Errand, name: str) -> tuple[str, int, int, int] | None:
    """Bus (its QOM path), channel, target and LUN of a device; None if it has gone meanwhile."""
    path = f"{_PERIPHERAL}/{name}"
    bus, place = await asyncio.gather(
        _answer(monitor, errand, "qom-get", {"path": path, "property": "parent_bus"}),
        _place(monitor, errand, path),
    )
    return (bus, *place) if isinstance(bus, str) and place else None


async def _controller(monitor: Monitor, errand: Errand, name: str) -> Controller | None:
    path = f"{_PERIPHERAL}/{name}"
    members = await _members(monitor, errand, path)
    if "virtio-backend" in members:
        path += "/virtio-backend"
        members = await _members(monitor, errand, path)
    buses = [member for member, kind in members.items() if kind == _SCSI_BUS]
    return Controller(name, f"{path}/{buses[0]}") if buses else None


async def _luns(monitor: Monitor, errand: Errand, controller: Controller) -> list[int]:
    members = await _members(monitor, errand, controller.bus)
    places = await asyncio.gather(
        *(
            _place(monitor, errand, f"{controller.bus}/{member}")
            for member in members
            if _BUS_CHILD.fullmatch(member)
        )
    )
    return [lun for channel, target, lun in filter(None, places) if channel == target == 0]


async def _place(monitor: Monitor, errand: Errand, path: str) -> tuple[int, int, int] | None:
    """Channel, target and LUN of a device; None if it has gone meanwhile."""
    answers = await asyncio.gather(
        *(
            _answer(monitor, errand, "qom-get", {"path": path, "property": name})
            for name in ("channel", "scsi-id", "lun")
        )
    )
    match answers:
        case [int() as channel, int() as target, int() as lun]:
            return channel, target, lun
    return None


async def _members(monitor: Monitor, errand: Errand, path: str) -> dict[str, str]:
    """Name -> type of an object's properties; none if there is no such object."""
    listing = await _answer(monitor, errand, "qom-list", {"path": path})
    return {entry["name"]: entry["type"] for entry in listing} if isinstance(listing, list) else {}


async def _answer(
    monitor: Monitor, errand: Errand, command: str, arguments: Mapping[str, object]
) -> object:
    """QEMU's answer; None if it knows no such object."""
    try:
        return await monitor.query(errand, command, arguments)
    except BackendError as error:
        if error.code is None:
            raise
        return None
