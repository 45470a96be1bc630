"""The document in which a Manager's disks go with their VM to another host.

{"hotlun": 1, "controllers": 4, "luns_per_controller": 64,
 "guest_mount_format": "/run/mounts/scsi/m%d", "disks": [one of `records` each]}
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from hotlun import record_checks
from hotlun.attachments import identify
from hotlun.host_paths import moved
from hotlun.model import DiskKind
from hotlun.recorder import with_holders
from hotlun.records import DiskRecord

if TYPE_CHECKING:
    from hotlun.tables import Tables

VERSION: Final = 1

_ARGUMENTS: Final = {"controllers": int, "luns_per_controller": int, "guest_mount_format": str}
"""What goes along of a Manager's arguments."""


def written(tables: Tables, salt: bytes) -> dict[str, Any]:
    """The document."""
    return {
        "hotlun": VERSION,
        "controllers": tables.slots.controllers,
        "luns_per_controller": tables.slots.luns,
        "guest_mount_format": tables.guest_mounts.pattern,
        "disks": [with_holders(disk).to_document(salt) for disk in tables.disks],
    }


async def seal(tables: Tables, salt: bytes) -> None:
    """Have the keys sealed that are going to be in the document: it takes too long for a loop."""
    for disk in tables.disks:
        for mount in disk.mounts.values():
            if mount.config.key is not None:
                await asyncio.to_thread(mount.config.key.seal, salt)


def arguments(document: Mapping[str, Any]) -> dict[str, Any]:
    """What the Manager was made with, for the one that goes on."""
    return {name: document[name] for name in _ARGUMENTS}


def read(document: Mapping[str, Any], paths: Mapping[str, str]) -> tuple[DiskRecord, ...]:
    """The disks, each by what it is known by here.

    Args:
        paths: see `host_paths.moved`.

    Raises:
        ValueError: it is no such document, or one of a newer hotlun; or two of its disks
            are one file here.
    """
    if not isinstance(document, Mapping):
        raise ValueError(f"no saved Manager, which is a mapping: {type(document).__name__}")
    version = document.get("hotlun")
    if version != VERSION:
        raise ValueError(f"no saved Manager that this hotlun can read: its version is {version!r}")
    if not isinstance(document.get("disks"), list) or any(
        type(document.get(name)) is not kind for name, kind in _ARGUMENTS.items()
    ):
        raise ValueError("no saved Manager: something is missing in it")
    records = tuple(_here(DiskRecord.from_document(disk), paths) for disk in document["disks"])
    record_checks.check(records)
    return records


def _here(record: DiskRecord, paths: Mapping[str, str]) -> DiskRecord:
    if record.disk.kind is DiskKind.EXTENSIBLE_VIRTUAL_DISK:
        return record
    old, new = record.disk.path, moved(record.disk.path, paths)
    _, path, identity = identify(new)
    # Access was granted to the file of before; to this one whoever put it here sees to it.
    grants = record.grants if new == old else ()
    disk = replace(record.disk, path=path)
    return record._replace(disk=disk, identity=identity, grants=grants)
