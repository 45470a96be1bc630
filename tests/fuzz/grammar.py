"""What a host says when it speaks well: every message, with every member that there is.

Drawn at random from what can make sense, so that a good share reaches a disk.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotlun.bridge import messages
from hotlun.bridge.messages import NULL_ID, MessageType

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping

ROOT_HASH = "5ca1ab1e" * 8
"""Of the verity tree that a disk of the fuzz's guest has."""

SECRET = b"hotlun-fuzz-secret:"
"""What every key begins with, so that one that leaks is known wherever it is."""
KEYS = (SECRET + b"right", SECRET + b"wrong", SECRET + bytes(range(256)))
SECRET_TEXT = base64.b64encode(SECRET)[:-4].decode()
"""The part of a key's base64 that they share, whatever follows."""

OPTIONS = (
    *("ro", "rw", "noatime", "nodev", "nosuid", "noexec", "relatime", "sync", "silent", "acl"),
    *("private", "rshared", "slave", "runbindable", "defaults", "discard", "data=ordered"),
    *("remount", "bind", 'context="a,b"', "nonsense=1", "iversion", "lazytime", ""),
)
FILESYSTEMS = ("", "", "ext4", "ext4", "xfs", "btrfs", "vfat", "ext2", "squashfs", "proc", "nofs")
ACTIVITY = "12345678-9abc-def0-1234-56789abcdef0"

_OTHERS = (
    MessageType.SHUTDOWN_GRACEFUL,
    MessageType.SHUTDOWN_FORCED,
    MessageType.EXECUTE_PROCESS,
    MessageType.WAIT_FOR_PROCESS,
    MessageType.SIGNAL_PROCESS,
    MessageType.RESIZE_CONSOLE,
    MessageType.DUMP_STACKS,
    MessageType.DELETE_CONTAINER_STATE,
    MessageType.UPDATE_CONTAINER,
    MessageType.LIFECYCLE_NOTIFICATION,
    MessageType.MODIFY_SERVICE_SETTINGS,
    MessageType.CONTAINER_NOTIFICATION,
)


@dataclass(frozen=True)
class Profile:
    """What the guest that is spoken to has."""

    slots: tuple[tuple[int, int], ...]
    """Controllers and LUNs; some without a disk."""
    paths: tuple[str, ...]
    timeouts: tuple[int, ...]
    """Milliseconds to wait for a disk; 0 for the agent's own default."""
    identities: Mapping[tuple[int, int], Mapping[str, Any]]
    """The serials and sizes of what is in the slots."""
    makes: float = 1.0
    """The share kept of the requests to make a filesystem, where that takes long."""
    encrypts: float = 1.0
    """The same of those to encrypt."""


@dataclass(frozen=True)
class Embedded:
    """A document in a string."""

    document: Any


@dataclass
class Message:
    """A frame in the making: its payload is the document unless it has one of its own."""

    kind: int
    id: int
    document: Any
    payload: bytes | None = None
    size: int | None = None
    """What the header claims, if not the truth."""


def conversation(choose: random.Random, profile: Profile) -> list[Message]:
    """A link's messages from the greeting on."""
    talk = [Message(MessageType.NEGOTIATE_PROTOCOL, 1, messages.negotiate_request())]
    before: dict[str, Any] | None = None
    for number in range(2, 2 + choose.choice((1, 1, 1, 2, 2, 3, 4))):
        kind, document = _request(choose, profile, before)
        if kind == MessageType.MODIFY_SETTINGS:
            before = document["Request"]
        if choose.random() < 0.1:
            document["ActivityId"] = choose.choice((ACTIVITY, "", "x", None))
        talk.append(Message(kind, number, document))
    return talk


def _request(
    choose: random.Random, profile: Profile, before: dict[str, Any] | None
) -> tuple[int, dict[str, Any]]:
    dice = choose.random()
    if dice < 0.79:
        if before is not None and choose.random() < 0.6:
            return MessageType.MODIFY_SETTINGS, messages.modify_request(_after(choose, before))
        return MessageType.MODIFY_SETTINGS, messages.modify_request(_modify(choose, profile))
    if dice < 0.81:
        return MessageType.CREATE, messages.create_request()
    if dice < 0.83:
        return MessageType.START, messages.start_request()
    if dice < 0.85:
        return MessageType.GET_PROPERTIES, {**messages.start_request(), "Query": "{}"}
    if dice < 0.94:
        query = Embedded({messages.EXTENSION: _survey(choose, profile, before)})
        return MessageType.GET_PROPERTIES, {**messages.start_request(), "Query": query}
    if dice < 0.96:
        return MessageType.NEGOTIATE_PROTOCOL, messages.negotiate_request()
    return choose.choice(_OTHERS), {"ContainerId": NULL_ID, "ActivityId": NULL_ID}


def _survey(
    choose: random.Random, profile: Profile, before: dict[str, Any] | None
) -> dict[str, Any]:
    """A few disks; among them, mostly, what has just been asked for."""
    disks = [_surveyed(choose, profile) for _ in range(choose.choice((0, 1, 1, 2)))]
    if before is not None and choose.random() < 0.8:
        settings = {name: value for name, value in before["Settings"].items() if name != "Key"}
        disk = {name: settings[name] for name in ("Controller", "Lun") if name in settings}
        disk.update(_serial(choose, profile, settings))
        disks.append({**disk, "Mounts": [settings]})
    return {"Disks": disks}


def _surveyed(choose: random.Random, profile: Profile) -> dict[str, Any]:
    slot = _slot(choose, profile)
    mounts = []
    for _ in range(choose.choice((0, 1, 1, 3))):
        settings = _disk(choose, profile)
        settings.pop("Key", None)
        mounts.append(settings)
    return {**slot, **_serial(choose, profile, slot), "Mounts": mounts}


def _serial(
    choose: random.Random, profile: Profile, settings: Mapping[str, Any]
) -> Mapping[str, Any]:
    identity = _identity(choose, profile, settings)
    return {name: identity[name] for name in identity if name == "Serial"}


def _after(choose: random.Random, before: dict[str, Any]) -> dict[str, Any]:
    """What usually follows: the same again, its undoing, or the disk's end."""
    dice = choose.random()
    settings = dict(before["Settings"])
    if dice < 0.25:
        return {**before, "Settings": settings}
    if dice < 0.75:
        settings.pop("Key", None)
        return {
            "RequestType": messages.REMOVE,
            "ResourceType": messages.MAPPED_VIRTUAL_DISK,
            "Settings": settings,
        }
    slot = {name: settings[name] for name in ("Controller", "Lun") if name in settings}
    return {
        "RequestType": messages.REMOVE,
        "ResourceType": messages.SCSI_DEVICE,
        "Settings": slot,
    }


def _modify(choose: random.Random, profile: Profile) -> dict[str, Any]:
    dice = choose.random()
    if dice < 0.06:
        settings = _slot(choose, profile)
        settings.update(_timeout(choose, profile))
        kind, resource = messages.REMOVE, messages.SCSI_DEVICE
    else:
        settings = _disk(choose, profile)
        kind = messages.ADD if dice < 0.85 else messages.REMOVE
        resource = messages.MAPPED_VIRTUAL_DISK
    if choose.random() < 0.02:
        kind = choose.choice(("", "Update", "add", "PreAdd"))
    if choose.random() < 0.02:
        resource = choose.choice(("", "CombinedLayers", "Network", "MappedDirectory"))
    return {"RequestType": kind, "ResourceType": resource, "Settings": settings}


def _slot(choose: random.Random, profile: Profile) -> dict[str, Any]:
    controller, lun = choose.choice(profile.slots)
    pairs = (("Lun", lun), ("Controller", controller))
    return {name: value for name, value in pairs if value}


def _identity(
    choose: random.Random, profile: Profile, settings: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Mostly the disk's own."""
    slot = settings.get("Controller", 0), settings.get("Lun", 0)
    own = profile.identities.get(slot, {})
    dice = choose.random()
    if dice < 0.75:
        return own
    if dice < 0.85:
        return {name: own[name] for name in own if name == choose.choice(("Serial", "Size"))}
    return choose.choice(({"Serial": "none of them"}, {"Size": 512}, *profile.identities.values()))


def _timeout(choose: random.Random, profile: Profile) -> dict[str, Any]:
    milliseconds = choose.choice(profile.timeouts)
    return {"TimeoutInMs": milliseconds} if milliseconds else {}


def _disk(choose: random.Random, profile: Profile) -> dict[str, Any]:
    """Settings of a MappedVirtualDisk. One style each, as mixtures are mostly refused."""
    some = choose.random
    settings: dict[str, Any] = {"MountPath": choose.choice(profile.paths), **_slot(choose, profile)}
    if some() < 0.1:
        settings["Partition"] = choose.choice((1, 1, 2, 5, 128, 1 << 63))
    if some() < 0.3:
        settings["ReadOnly"] = some() < 0.9
    if some() < 0.25:
        settings["Options"] = choose.choices(OPTIONS, k=choose.randrange(4))
    filesystem = "" if some() < 0.4 else choose.choice(FILESYSTEMS)
    if filesystem:
        settings["Filesystem"] = filesystem
    style = some()
    if some() > (1.0 if style < 0.12 else profile.makes if style < 0.35 else profile.encrypts):
        style = 1.0
    if style < 0.12:
        settings["BlockDev"] = True
    elif style < 0.35:
        settings["EnsureFilesystem"] = True
        settings["Filesystem"] = choose.choice(("ext4", "xfs", "btrfs", filesystem))
        settings["PreserveData"] = some() < 0.4
    elif style < 0.47:
        settings.update(Encrypted=True, EnsureFilesystem=True, ReadOnly=some() < 0.1)
        settings["Filesystem"] = choose.choice(("ext4", "xfs", "btrfs"))
    elif style < 0.62:
        settings.update(Encrypted=True, Key=base64.b64encode(choose.choice(KEYS)).decode())
        if some() < 0.5:
            settings.update(EnsureFilesystem=True, Filesystem=choose.choice(("ext4", "xfs")))
    elif style < 0.74:
        root_hash = ROOT_HASH if some() < 0.7 else "AB" * 32
        settings.update(ReadOnly=True, Verity={"RootHash": root_hash})
        if some() < 0.5:
            settings["Verity"]["HashOffset"] = choose.choice((0, 512, 65536, 1 << 40))
    if some() < 0.3:
        settings.update(_identity(choose, profile, settings))
    if some() < 0.1:
        settings["LazyUnmount"] = True
    settings.update(_timeout(choose, profile))
    return settings
