"""How much of some attachments a VM has, whoever attached them: looked up, never changed.

Two questions list the devices and the block nodes of the VM. Where a device is has to be
asked of each, so that is asked of those only that are wanted and there, all at once.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from hotlun.backends.attached import id_of
from hotlun.backends.nodes import driver_of
from hotlun.backends.topology import devices_with_ids, place_of
from hotlun.model import DiskKind, ImageFormat, Presence

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from hotlun.backends.errand import Errand
    from hotlun.backends.monitor import Monitor
    from hotlun.backends.topology import Controller
    from hotlun.model import Attachment, Disk

    Info = Mapping[str, object]


class Sight(NamedTuple):
    """What there is of an attachment.

    Args:
        presence: how much.
        size: in bytes, as the guest sees it; None if that is not certain.
        has_backing: its image rests on another one.
    """

    presence: Presence
    size: int | None = None
    has_backing: bool = False


async def look(
    monitor: Monitor,
    errand: Errand,
    controllers: Sequence[Controller],
    attachments: Collection[Attachment],
) -> dict[str, Sight]:
    """What there is of each attachment, by serial.

    Raises:
        BackendError: the VM does not answer.
    """
    if not attachments:
        return {}
    devices, listing = await asyncio.gather(
        devices_with_ids(monitor, errand),
        monitor.query(errand, "query-named-block-nodes", {"flat": True}),
    )
    nodes: dict[str, Info] = (
        {str(node.get("node-name")): node for node in listing if isinstance(node, dict)}
        if isinstance(listing, list)
        else {}
    )
    complete = [each for each in attachments if id_of(each) in devices and id_of(each) in nodes]
    places = await asyncio.gather(*(place_of(monitor, errand, id_of(each)) for each in complete))
    seen = {
        each.serial: Sight(
            Presence.PARTIAL if id_of(each) in devices or id_of(each) in nodes else Presence.ABSENT
        )
        for each in attachments
    }
    for each, place in zip(complete, places, strict=True):
        node, slot = nodes[id_of(each)], each.slot
        if (
            slot.controller < len(controllers)
            and place == (controllers[slot.controller].bus, 0, 0, slot.lun)
            and (node.get("drv"), node.get("ro")) == (driver_of(each.disk), each.disk.read_only)
        ):
            seen[each.serial] = Sight(
                Presence.PRESENT,
                _size(each.disk, node),
                # `backing_file_depth` is 0 for all of a flat listing (7.2).
                "backing_file" in node,
            )
    return seen


def _size(disk: Disk, node: Info) -> int | None:
    """What QEMU says, where the guest sees just that: not of a VHD, nor of what a server has."""
    if disk.kind is DiskKind.EXTENSIBLE_VIRTUAL_DISK or disk.format is ImageFormat.VHD:
        return None
    image = node.get("image")
    size = image.get("virtual-size") if isinstance(image, dict) else None
    return size if isinstance(size, int) else None
