"""The modify requests that have a guest mount, unmount and let go of a disk. Pure.

The bridge sends them itself; the Windows compute service relays the same ones. So
both refuse here, before anything is sent, what a guest would choke on (hcsshim's
Linux agent indexes an array of four with the controller, and dies of a fifth) or
would drop without a word.

Shapes and member order are those of hcsshim (`internal/protocol/guestresource`):
members that are zero, false or empty are left out. Other than in hcsshim, a Remove
carries the whole config of its Add: without `Encrypted` the agent would leave the
mapping of an encrypted disk behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hotlun.bridge.messages import ADD, MAPPED_VIRTUAL_DISK, REMOVE, SCSI_DEVICE
from hotlun.errors import UnsupportedError
from hotlun.guest_paths import normalise

if TYPE_CHECKING:
    from hotlun.backends.base import OSType
    from hotlun.model import Attachment, Disk, GuestMount, MountConfig

    Request = dict[str, Any]

CONTROLLERS: dict[OSType, int] = {"linux": 4, "windows": 1}
"""How many controllers a guest can use, by its system."""

MAX_LUN = 255
"""The largest LUN that the bridge can say; the compute service stops at 63."""


def mount_request(mount: GuestMount, os_type: OSType, *, max_lun: int = MAX_LUN) -> Request:
    """Have the guest mount it.

    Raises:
        UnsupportedError: no guest of this kind can, or none can be told.
    """
    check(mount.attachment.disk, mount.config, mount.path, os_type)
    return _mapped_disk(ADD, mount, os_type, max_lun)


def unmount_request(mount: GuestMount, os_type: OSType, *, max_lun: int = MAX_LUN) -> Request:
    """Have the guest undo `mount_request`.

    Raises:
        UnsupportedError: the guest cannot be told of this slot.
    """
    return _mapped_disk(REMOVE, mount, os_type, max_lun)


def unplug_request(
    attachment: Attachment, os_type: OSType, *, max_lun: int = MAX_LUN
) -> Request | None:
    """Have the guest let go of the device; None for Windows, which needs no word about it.

    Raises:
        UnsupportedError: the guest cannot be told of this slot.
    """
    _check_slot("unplug", attachment, os_type, max_lun)
    if os_type == "windows":
        return None
    slot = attachment.slot
    return _request(REMOVE, SCSI_DEVICE, Controller=slot.controller, Lun=slot.lun)


def check(disk: Disk, config: MountConfig, path: str, os_type: OSType) -> None:
    """Refuse a mount that no guest of this kind can do.

    Raises:
        UnsupportedError: that, naming what cannot be done.
    """

    def refuse(problem: str, advice: str) -> UnsupportedError:
        return UnsupportedError(
            f"cannot mount {disk} at {path!r}: {problem}; {advice}", operation="mount", disk=disk
        )

    try:
        normalise(path, os_type)  # an empty one would be a mount nowhere, and a success
    except ValueError as error:
        raise refuse(str(error), f"a {os_type} guest needs another path") from None
    if os_type == "windows":
        asked = [
            name
            for name in (
                "partition",
                "encrypted",
                "options",
                "ensure_filesystem",
                "filesystem",
                "block_device",
            )
            if getattr(config, name)
        ]
        if asked:
            raise refuse(
                f"a Windows guest does not know {', '.join(asked)}", "leave that out of the config"
            )


def _mapped_disk(verb: str, mount: GuestMount, os_type: OSType, max_lun: int) -> Request:
    _check_slot("mount" if verb == ADD else "unmount", mount.attachment, os_type, max_lun)
    slot, config = mount.attachment.slot, mount.config
    if os_type == "windows":
        return _request(verb, MAPPED_VIRTUAL_DISK, ContainerPath=mount.path, Lun=slot.lun)
    return _request(
        verb,
        MAPPED_VIRTUAL_DISK,
        MountPath=mount.path,
        Lun=slot.lun,
        Controller=slot.controller,
        Partition=config.partition,
        ReadOnly=mount.read_only,
        Encrypted=config.encrypted,
        Options=list(config.options),
        BlockDev=config.block_device,
        EnsureFilesystem=config.ensure_filesystem,
        Filesystem=config.filesystem,
    )


def _request(verb: str, resource: str, **settings: Any) -> Request:
    return {
        "RequestType": verb,
        "ResourceType": resource,
        "Settings": {name: value for name, value in settings.items() if value},
    }


def _check_slot(operation: str, attachment: Attachment, os_type: OSType, max_lun: int) -> None:
    slot, controllers = attachment.slot, CONTROLLERS[os_type]
    if slot.controller < controllers and slot.lun <= max_lun:
        return
    raise UnsupportedError(
        f"cannot {operation} {attachment.disk} at slot {slot}: a {os_type} guest has "
        f"controllers 0 to {controllers - 1} with LUNs 0 to {max_lun}; give the Manager "
        "no more than that",
        operation=operation,
        slot=slot,
        disk=attachment.disk,
    )
