"""The documents of the Host Compute Service that concern disks: what is sent, and read. Pure.

Shapes and member order are hcsshim's (`internal/hcs/schema2`): a member that is false or empty
is left out. A controller is named by a GUID in the VM's document, and by the same one in each
resource path; only then does a Linux guest find it by that GUID (its VMBus channel).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from hotlun.errors import UnsupportedError
from hotlun.model import DiskKind, ImageFormat, Slot

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from hotlun.model import Attachment, Disk

CONTROLLERS: Final = (
    "df6d0690-79e5-55b6-a5ec-c1e2f77f580a",
    "0110f83b-de10-5172-a266-78bca56bf50a",
    "b5d2d8d4-3a75-51bf-945b-3444dc6b8579",
    "305891a9-b251-5dfe-91a2-c25d9212275b",
)
"""The GUIDs of the controllers, by number: uuid5(d422512d-2bf2-4752-809d-7b82b5fcb1b4, "0")...

hcsshim: ScsiControllerGuids.
"""

LUNS: Final = 64
"""Of each controller (Hyper-V)."""

_ADD, _REMOVE = "Add", "Remove"
_LUN = re.compile(r"0|[1-9][0-9]{0,4}")
_FORMATS: Final = (None, ImageFormat.VHD, ImageFormat.VHDX)
_DISKS: Final = "MappedVirtualDisk"


def add_document(
    attachment: Attachment, controllers: Sequence[str] = CONTROLLERS
) -> dict[str, Any]:
    """Have the disk attached.

    Raises:
        UnsupportedError: there is no such slot, or the service reads no such images.
    """
    settings = _attachment(attachment.disk)
    return {
        "ResourcePath": _resource_path(attachment, controllers, "attach"),
        "RequestType": _ADD,
        "Settings": settings,
    }


def remove_document(
    attachment: Attachment, controllers: Sequence[str] = CONTROLLERS
) -> dict[str, Any]:
    """Have whatever is in the slot detached. Raises as `add_document`."""
    return {
        "ResourcePath": _resource_path(attachment, controllers, "detach"),
        "RequestType": _REMOVE,
    }


def guest_document(request: Mapping[str, Any]) -> dict[str, Any]:
    """Have a request relayed to the guest, by the connection that the service has to it."""
    return {"GuestRequest": request}


def hcs_document(
    disks: Mapping[Slot, Disk] | None = None,
    *,
    controllers: int = len(CONTROLLERS),
    into: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The document of a VM with the controllers that hotlun attaches disks to.

    For whoever creates the VM: controllers cannot be added to one that runs.

    Args:
        disks: that the VM starts with, by slot. They are the VM's own: give these slots to the
            Manager as `reserved_slots`.
        controllers: how many, 1 to 4; a Windows guest uses the first.
        into: a document to put them into, which stays as it is. What it has of SCSI
            controllers and disks is kept.

    Returns:
        `into` with `VirtualMachine.Devices.Scsi` filled; without one, just that.

    Raises:
        ValueError: a slot beyond the controllers, or one that `into` has filled.
        UnsupportedError: the service reads no such images.
    """
    if not 1 <= controllers <= len(CONTROLLERS):
        raise ValueError(f"a VM has 1 to {len(CONTROLLERS)} controllers, not {controllers}")
    document: dict[str, Any] = copy.deepcopy(dict(into or {}))
    scsi = _section(_section(_section(document, "VirtualMachine"), "Devices"), "Scsi")
    for name in CONTROLLERS[:controllers]:
        if _key(scsi, name) is None:
            scsi[name] = {}
    for slot, disk in sorted((disks or {}).items()):
        if slot.controller >= controllers or slot.lun >= LUNS:
            raise ValueError(
                f"there is no slot {slot} for {disk}: there are {controllers} controllers with "
                f"{LUNS} LUNs each"
            )
        attachments = _section(_section(scsi, CONTROLLERS[slot.controller]), "Attachments")
        if attachments.setdefault(str(slot.lun), None) is not None:
            raise ValueError(f"slot {slot} is taken in the document: {disk} needs another")
        attachments[str(slot.lun)] = _attachment(disk)
    return document


def document_slots(
    document: Mapping[str, Any], controllers: Sequence[str] = CONTROLLERS
) -> frozenset[Slot]:
    """The slots that the document of a VM fills: what a Manager is to reserve.

    Args:
        document: as it was given to the service, or a file has it.
        controllers: their names or GUIDs in it, in our order; others are not looked at.

    Raises:
        ValueError: what is there is no document of a VM.
    """
    scsi: Mapping[str, Any] = document
    for name in ("VirtualMachine", "Devices", "Scsi"):
        scsi = _mapping(_member(scsi, name) or {}, name)
    return frozenset(
        Slot(number, lun)
        for number, name in enumerate(controllers)
        if (key := _key(scsi, name)) is not None
        for lun in _luns(_member(_mapping(scsi[key] or {}, key), "Attachments") or {}, key)
    )


PROPERTY_QUERY: Final = {"PropertyTypes": [_DISKS]}
"""Asks what is attached; where the service does not know that property, it leaves it out."""


def attached_paths(properties: Mapping[str, Any]) -> dict[Slot, str] | None:
    """The host paths of what is attached, by slot; None if the service does not say.

    From `MappedVirtualDiskControllers` (hcsshim `internal/hcs/schema1`: controller numbers, then
    LUNs, as members). What in it is not of that shape is passed over.
    """
    told = properties.get(f"{_DISKS}Controllers")
    if not isinstance(told, Mapping):
        return None
    return {
        Slot(int(number), int(lun)): disk["HostPath"]
        for number, controller in told.items()
        if _LUN.fullmatch(number) and isinstance(controller, Mapping)
        for lun, disk in _entries(controller.get(f"{_DISKS}s"))
        if _LUN.fullmatch(lun) and isinstance(disk.get("HostPath"), str)
    }


def _entries(section: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(section, Mapping):
        yield from ((name, one) for name, one in section.items() if isinstance(one, Mapping))


def _attachment(disk: Disk) -> dict[str, Any]:
    if disk.kind is DiskKind.VIRTUAL_DISK and disk.format not in _FORMATS:
        raise UnsupportedError(
            f"Hyper-V attaches no {disk.format} images, only VHD and VHDX: convert {disk} "
            "with `qemu-img convert -O vhdx`",
            operation="attach",
            disk=disk,
        )
    members = {
        "Type": str(disk.kind),
        "Path": disk.path,
        "ReadOnly": disk.read_only,
        "ExtensibleVirtualDiskType": disk.provider,
    }
    return {name: value for name, value in members.items() if value}


def _resource_path(attachment: Attachment, controllers: Sequence[str], operation: str) -> str:
    slot = attachment.slot
    if slot.controller >= len(controllers) or slot.lun >= LUNS:
        raise UnsupportedError(
            f"cannot {operation} {attachment.disk} at slot {slot}: the VM has {len(controllers)} "
            f"controllers with {LUNS} LUNs each; give the Manager no more",
            operation=operation,
            slot=slot,
            disk=attachment.disk,
        )
    name = controllers[slot.controller]
    return f"VirtualMachine/Devices/Scsi/{name}/Attachments/{slot.lun}"


def _section(document: dict[str, Any], name: str) -> dict[str, Any]:
    key = _key(document, name) or name
    inner = dict(_mapping(document.get(key) or {}, name))
    document[key] = inner
    return inner


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} of a VM's document is an object, not {type(value).__name__}")
    return value


def _key(document: Mapping[str, Any], name: str) -> str | None:
    """How a name is spelt there: GUIDs have no case."""
    return next((key for key in document if key.lower() == name.lower()), None)


def _member(document: Mapping[str, Any], name: str) -> Any:
    key = _key(document, name)
    return None if key is None else document[key]


def _luns(attachments: object, name: str) -> Collection[int]:
    found = _mapping(attachments, f"Attachments of {name}")
    for lun in found:
        if not _LUN.fullmatch(lun) or int(lun) >= LUNS:
            raise ValueError(f"an attachment of {name} has a LUN from 0 to {LUNS - 1}: {lun!r}")
    return [int(lun) for lun in found]
