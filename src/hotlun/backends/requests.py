"""The modify requests that have a guest mount, unmount and let go of a disk. Pure.

The bridge sends them itself; the Windows compute service relays the same ones. So
both refuse here, before anything is sent, what a guest would choke on (hcsshim's
Linux agent indexes an array of four with the controller, and dies of a fifth) or
would drop without a word: an agent does what the original one does, and more only
as far as it has announced the feature.

Shapes and member order are those of hcsshim (`internal/protocol/guestresource`):
members that are zero, false or empty are left out. What hcsshim does not know comes
behind the rest, and only to an agent with the feature. Other than in hcsshim, a
Remove carries the whole config of its Add, less the key: without `Encrypted` the
agent would leave the mapping of an encrypted disk behind.
"""

from __future__ import annotations

import base64
import dataclasses
from typing import TYPE_CHECKING, Any

from hotlun.bridge.messages import (
    ADD,
    CONTAINER_SCRATCH,
    FEATURE_FILESYSTEMS,
    FEATURE_IDENTITY,
    FEATURE_KEYS,
    FEATURE_LAZY_UNMOUNT,
    FEATURE_OPTIONS,
    FEATURE_PRESERVE_DATA,
    FEATURE_VERITY,
    MAPPED_VIRTUAL_DISK,
    REMOVE,
    SCSI_DEVICE,
)
from hotlun.errors import UnsupportedError
from hotlun.guest_paths import normalise
from hotlun.model import PROPAGATIONS, DiskIdentity, Verity

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from hotlun.backends.base import OSType
    from hotlun.model import Attachment, Disk, GuestMount, MountConfig, Slot

    Request = dict[str, Any]

CONTROLLERS: dict[OSType, int] = {"linux": 4, "windows": 1}
"""How many controllers a guest can use, by its system."""

FEATURES = frozenset(
    {
        FEATURE_FILESYSTEMS,
        FEATURE_IDENTITY,
        FEATURE_KEYS,
        FEATURE_LAZY_UNMOUNT,
        FEATURE_OPTIONS,
        FEATURE_PRESERVE_DATA,
        FEATURE_VERITY,
    }
)
"""All that a mount can take of our extension."""

MAX_LUN = 255
"""The largest LUN that the bridge can say; the compute service stops at 63."""


def mount_request(
    mount: GuestMount, os_type: OSType, features: Collection[str] = (), *, max_lun: int = MAX_LUN
) -> Request:
    """Have the guest mount it.

    Args:
        mount: what, where and how.
        os_type: whose document it is to be.
        features: what the guest's agent has announced of our extension.
        max_lun: the largest LUN that can be said.

    Raises:
        UnsupportedError: as `check`, or the guest cannot be told of this slot.
    """
    check(mount.attachment.disk, mount.config, mount.path, os_type, features)
    return _mapped_disk(ADD, mount, os_type, features, max_lun)


def unmount_request(
    mount: GuestMount, os_type: OSType, features: Collection[str] = (), *, max_lun: int = MAX_LUN
) -> Request:
    """Have the guest undo `mount_request`; arguments as there.

    Raises:
        UnsupportedError: the guest cannot be told of this slot.
    """
    return _mapped_disk(REMOVE, mount, os_type, features, max_lun)


def unplug_request(
    attachment: Attachment, os_type: OSType, *, max_lun: int = MAX_LUN
) -> Request | None:
    """Have the guest let go of the device; None for Windows, which needs no word about it.

    Nor has it of a slot that it cannot use: a disk that is there all the same, found in a
    journal, can be detached.

    Raises:
        UnsupportedError: the guest cannot be told of this slot.
    """
    if os_type == "windows":
        return None
    _check_slot("unplug", attachment, os_type, max_lun)
    slot = attachment.slot
    return _request(REMOVE, SCSI_DEVICE, Controller=slot.controller, Lun=slot.lun)


def mount_query(mount: GuestMount) -> dict[str, Any]:
    """The members by which a survey asks for a mount: what is to be where, and no key."""
    config, verity = mount.config, mount.config.verity
    return _less_zeros(
        {
            "MountPath": mount.path,
            "Partition": config.partition,
            "Encrypted": config.encrypted,
            "BlockDev": config.block_device,
            "Verity": _tree(verity) if isinstance(verity, Verity) else None,
        }
    )


def is_sayable(slot: Slot, os_type: OSType = "linux", *, max_lun: int = MAX_LUN) -> bool:
    """Whether the guest can be told of this slot."""
    return slot.controller < CONTROLLERS[os_type] and slot.lun <= max_lun


def check(
    disk: Disk, config: MountConfig, path: str, os_type: OSType, features: Collection[str] = ()
) -> None:
    """Refuse a mount that no guest of this kind can do, or not this one's agent.

    Raises:
        UnsupportedError: that, naming what cannot be done.
    """
    for problem, advice in _problems(disk, config, path, os_type, features):
        raise UnsupportedError(
            f"cannot mount {disk} at {path!r}: {problem}; {advice}", operation="mount", disk=disk
        )


def _problems(
    disk: Disk, config: MountConfig, path: str, os_type: OSType, features: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Each reason why this guest cannot do the mount, and what to do about it."""
    try:
        normalise(path, os_type)  # an empty one would be a mount nowhere, and a success
    except ValueError as error:
        yield str(error), f"a {os_type} guest needs another path"
    if os_type == "windows":
        names = (field.name for field in dataclasses.fields(config) if field.init)
        asked = [name for name in names if name != "container_scratch" and getattr(config, name)]
        if asked:
            yield (
                f"a Windows guest does not know {', '.join(asked)}",
                "leave that out of the config",
            )
        if config.container_scratch and disk.read_only:
            yield "container_scratch formats it, and it is read-only", "attach it writable"
    elif config.container_scratch:
        yield (
            "a Linux guest does not know container_scratch",
            "use encrypted=True with ensure_filesystem for a scratch disk",
        )
    if config.verity is not None and not disk.read_only:
        yield "verity is for a disk that nobody writes", "attach it with read_only=True"
    for feature, would, way_round in _needs(config):
        if feature not in features:
            yield (
                f"this guest's agent {would}",
                f"run hotlun's agent of this version in the guest, or {way_round}",
            )


def _needs(config: MountConfig) -> Iterator[tuple[str, str, str]]:
    """Each feature that the mount takes, what an agent without it would do, and a way round."""
    if dropped := [option for option in config.options if option not in PROPAGATIONS]:
        yield FEATURE_OPTIONS, f"would ignore the options {', '.join(dropped)}", "leave them out"
    if config.ensure_filesystem and config.filesystem != "ext4" and not config.encrypted:
        yield (
            FEATURE_FILESYSTEMS,
            f"would format over a {config.filesystem} that is already there",
            "mount without ensure_filesystem",
        )
    if config.preserve_data:
        yield (
            FEATURE_PRESERVE_DATA,
            "would format over whatever else it finds, whether preserve_data is asked for or not",
            "mount without ensure_filesystem",
        )
    if config.key is not None:
        yield (
            FEATURE_KEYS,
            "would ignore the key, and throw away what the disk holds",
            "leave the key out, for a volume that lasts as long as its mount",
        )
    if config.verity is not None:
        yield FEATURE_VERITY, "would ignore verity, and check nothing", "leave verity out"
    if config.lazy_unmount:
        yield (
            FEATURE_LAZY_UNMOUNT,
            "would ignore lazy_unmount, and unmount nothing that is in use",
            "leave lazy_unmount out",
        )


def _mapped_disk(
    verb: str, mount: GuestMount, os_type: OSType, features: Collection[str], max_lun: int
) -> Request:
    _check_slot("mount" if verb == ADD else "unmount", mount.attachment, os_type, max_lun)
    slot, config = mount.attachment.slot, mount.config
    if os_type == "windows":
        is_scratch = config.container_scratch and verb == ADD
        resource = CONTAINER_SCRATCH if is_scratch else MAPPED_VIRTUAL_DISK
        return _request(verb, resource, ContainerPath=mount.path, Lun=slot.lun)
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
        **_extension(verb, mount, features),
    )


def _extension(verb: str, mount: GuestMount, features: Collection[str]) -> dict[str, Any]:
    """The members that hcsshim does not know, as far as the agent does."""
    config, identity, verity = mount.config, mount.identity or DiskIdentity(), mount.config.verity
    members: list[tuple[str, str, Any]] = [
        (FEATURE_PRESERVE_DATA, "PreserveData", config.preserve_data)
    ]
    if verb == ADD:
        members += [
            (FEATURE_IDENTITY, "Serial", identity.serial),
            (FEATURE_IDENTITY, "Size", identity.size),
        ]
        if config.key is not None:
            key = _Unseen(base64.b64encode(config.key.reveal()).decode())
            members.append((FEATURE_KEYS, "Key", key))
    if isinstance(verity, Verity):
        members.append((FEATURE_VERITY, "Verity", _tree(verity)))
    members.append((FEATURE_LAZY_UNMOUNT, "LazyUnmount", config.lazy_unmount))
    return {name: value for feature, name, value in members if feature in features}


def _tree(verity: Verity) -> dict[str, Any]:
    return _less_zeros({"RootHash": verity.root_hash, "HashOffset": verity.hash_offset})


class _Unseen(str):
    """Text that is sent as it is, and not shown when the request is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'...'"


def _request(verb: str, resource: str, **settings: Any) -> Request:
    return {
        "RequestType": verb,
        "ResourceType": resource,
        "Settings": _less_zeros(settings),
    }


def _less_zeros(members: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value}


def _check_slot(operation: str, attachment: Attachment, os_type: OSType, max_lun: int) -> None:
    slot = attachment.slot
    if is_sayable(slot, os_type, max_lun=max_lun):
        return
    raise UnsupportedError(
        f"cannot {operation} {attachment.disk} at slot {slot}: a {os_type} guest has "
        f"controllers 0 to {CONTROLLERS[os_type] - 1} with LUNs 0 to {max_lun}; give the Manager "
        "no more than that",
        operation=operation,
        slot=slot,
        disk=attachment.disk,
    )
