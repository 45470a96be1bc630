"""What QEMU is told of a device, by whoever tells it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotlun.backends.attached import id_of

if TYPE_CHECKING:
    from hotlun.backends.nodes import Node
    from hotlun.model import Attachment


def device_properties(attachment: Attachment, bus: str) -> Node:
    """The arguments of `device_add` that show the attachment's node to the guest."""
    name = id_of(attachment)
    return {
        "driver": "scsi-hd",
        "id": name,
        "drive": name,
        "bus": bus,
        "channel": 0,
        "scsi-id": 0,
        "lun": attachment.slot.lun,
        "serial": attachment.serial,
        "device_id": attachment.serial,
    }
