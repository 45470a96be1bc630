"""The disks of a VM as arguments for another QEMU: the same nodes, the same devices.

See `QEMUHostBackend.device_arguments` for what else a migration needs.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, cast

from hotlun.backends.attached import id_of
from hotlun.backends.errand import Errand
from hotlun.backends.nodes import block_node
from hotlun.errors import BackendError, UnsupportedError
from hotlun.host_paths import moved

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from hotlun.backends.attached import Attached
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


def command_line(
    disks: Sequence[tuple[Attached, str]],
    paths: Mapping[str, str],
    *,
    allow_backing: Collection[str] = (),
) -> list[str]:
    """The arguments that make these disks, each on the bus of that name.

    Raises:
        BackendError: an image of somebody else's making cannot be looked into.
    """
    arguments: list[str] = []
    for entry, bus in disks:
        node = _there(entry.node or _found_node(entry, allow_backing), paths)
        device = device_properties(entry.attachment, bus)
        arguments += ["-blockdev", json.dumps(node), "-device", json.dumps(device)]
    return arguments


def _found_node(entry: Attached, allow_backing: Collection[str]) -> Node:
    """The node of what another process has attached, made as that process will have made it."""
    attachment = entry.attachment
    try:
        return block_node(
            attachment.disk,
            id_of(attachment),
            allow_backing=allow_backing,
            is_open=not entry.has_backing,
        ).arguments
    except (BackendError, UnsupportedError) as error:
        errand = Errand.on(attachment, "tell another VM of")
        raise errand.error(type(error), str(error), detail=error.detail) from error


def _there(node: Node, paths: Mapping[str, str]) -> Node:
    """A node with its paths as they are there."""
    there = dict(node)
    for key in ("file", "backing", "server"):
        if isinstance(there.get(key), dict):
            there[key] = _there(cast("Node", there[key]), paths)
    for key in ("filename", "path"):
        if isinstance(there.get(key), str):
            there[key] = moved(str(there[key]), paths)
    return there
