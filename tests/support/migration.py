"""The other end of a live migration: a machine that has the disks that a guest brings along."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hotlun.backends.nodes import block_node

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hotlun.model import Attachment


def disk_arguments(attachments: Sequence[Attachment]) -> Iterator[str]:
    """QEMU's arguments for disks as `QEMUHostBackend.attach` plugs them in."""
    for attachment in attachments:
        name = f"hotlun-{attachment.serial}"
        slot = attachment.slot
        device = {
            "driver": "scsi-hd",
            "id": name,
            "drive": name,
            "bus": f"scsi{slot.controller}.0",
            "channel": 0,
            "scsi-id": 0,
            "lun": slot.lun,
            "serial": attachment.serial,
            "device_id": attachment.serial,
        }
        yield from ("-blockdev", json.dumps(block_node(attachment.disk, name).arguments))
        yield from ("-device", json.dumps(device))
