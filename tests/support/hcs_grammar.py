"""What a ModifySettingRequest about disks may look like, to the letter, for a Linux guest.

Written from the public schema and from what hcsshim sends, and not from our own documents: the
GUIDs are worked out anew. Whatever hcsshim would not have sent in this way is refused, but for
our extension's members, and those only for an agent that has announced them.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotlun.bridge import messages
from hotlun.model import DiskKind, Slot

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    Check = Callable[[Any], bool]

_NAMESPACE = uuid.UUID("d422512d-2bf2-4752-809d-7b82b5fcb1b4")
GUIDS = [str(uuid.uuid5(_NAMESPACE, str(number))) for number in range(4)]
LUNS = 64
_PATH = re.compile(r"VirtualMachine/Devices/Scsi/([^/]+)/Attachments/(0|[1-9][0-9]?)")


class InvalidDocumentError(ValueError):
    """It is not what hcsshim would have sent."""


@dataclass(frozen=True)
class ResourceRequest:
    """Something about the slot of a controller."""

    slot: Slot
    is_add: bool
    kind: DiskKind = DiskKind.VIRTUAL_DISK
    path: str = ""
    read_only: bool = False
    provider: str = ""

    @property
    def verb(self) -> str:
        """As the backends have it."""
        return "attach" if self.is_add else "detach"


@dataclass(frozen=True)
class GuestRequest:
    """Something for the guest; `document` is what it is to be sent."""

    document: Mapping[str, Any]
    verb: str
    slot: Slot


def read(text: str, features: Collection[str] = ()) -> ResourceRequest | GuestRequest:
    """What a document asks for.

    Args:
        text: the document.
        features: those of our extension that the guest's agent has announced.

    Raises:
        InvalidDocumentError: anything in it is not as it has to be.
    """
    document = _parsed(text)
    if "GuestRequest" in document:
        _members("the document", document, {"GuestRequest": _is_object}, {})
        return _guest_request(document["GuestRequest"], features)
    is_add = document.get("RequestType") == "Add"
    _members(
        "the document",
        document,
        {
            "ResourcePath": _is_text,
            "RequestType": lambda value: value in ("Add", "Remove"),
            **({"Settings": _is_object} if is_add else {}),
        },
        {},
    )
    slot = _slot(document["ResourcePath"])
    return _attachment(slot, document["Settings"]) if is_add else ResourceRequest(slot, False)


def read_query(text: str) -> list[str]:
    """The PropertyTypes of a query, none for the service's own choice. Raises as `read`."""
    query = _parsed(text)
    _members("the query", query, {}, {"PropertyTypes": _is_texts})
    return list(query.get("PropertyTypes", ()))


def _attachment(slot: Slot, settings: Mapping[str, Any]) -> ResourceRequest:
    kind = settings.get("Type")
    is_extensible = kind == DiskKind.EXTENSIBLE_VIRTUAL_DISK
    _members(
        "Settings",
        settings,
        {"Type": lambda value: value in set(DiskKind), "Path": _is_text},
        {
            "ReadOnly": _is_true,
            **({"ExtensibleVirtualDiskType": _is_text} if is_extensible else {}),
        },
    )
    provider = settings.get("ExtensibleVirtualDiskType", "")
    if is_extensible and not provider:
        raise InvalidDocumentError("an ExtensibleVirtualDisk has no ExtensibleVirtualDiskType")
    return ResourceRequest(
        slot,
        True,
        DiskKind(settings["Type"]),
        settings["Path"],
        settings.get("ReadOnly", False),
        provider,
    )


def _slot(path: str) -> Slot:
    found = _PATH.fullmatch(path)
    if found is None or found[1] not in GUIDS or int(found[2]) >= LUNS:
        raise InvalidDocumentError(f"the ResourcePath is no slot of this VM: {path!r}")
    return Slot(GUIDS.index(found[1]), int(found[2]))


def _guest_request(request: Mapping[str, Any], features: Collection[str]) -> GuestRequest:
    _members(
        "GuestRequest",
        request,
        {
            "RequestType": lambda value: value in ("Add", "Remove"),
            "ResourceType": lambda value: value in ("MappedVirtualDisk", "SCSIDevice"),
            "Settings": _is_object,
        },
        {},
    )
    is_add, settings = request["RequestType"] == "Add", request["Settings"]
    if request["ResourceType"] == "SCSIDevice":
        if is_add:
            raise InvalidDocumentError("a SCSIDevice can only be removed")
        _members("Settings", settings, {}, {"Controller": _upto(3), "Lun": _upto(LUNS - 1)})
        verb = "unplug"
    else:
        optional = {**_MAPPED, **_extension(is_add, features)}
        _members("Settings", settings, {"MountPath": _is_text}, optional)
        verb = "mount" if is_add else "unmount"
    slot = Slot(settings.get("Controller", 0), settings.get("Lun", 0))
    return GuestRequest(request, verb, slot)


def _extension(is_add: bool, features: Collection[str]) -> dict[str, Check]:
    """Serial and Size are not among them: nobody gives a disk of the service a serial."""
    members: list[tuple[str, str, Check]] = [
        (messages.FEATURE_PRESERVE_DATA, "PreserveData", _is_true)
    ]
    if is_add:
        members.append((messages.FEATURE_KEYS, "Key", _is_text))
    members += [
        (messages.FEATURE_VERITY, "Verity", _is_object),
        (messages.FEATURE_LAZY_UNMOUNT, "LazyUnmount", _is_true),
    ]
    return {name: fits for feature, name, fits in members if feature in features}


def _members(
    where: str,
    document: Mapping[str, Any],
    required: Mapping[str, Check],
    optional: Mapping[str, Check],
) -> None:
    """Check that these are all there, each as it has to be, in this order, and no others."""
    known = {**required, **optional}
    names = list(document)
    if unknown := [name for name in names if name not in known]:
        raise InvalidDocumentError(f"{where} has the unknown {', '.join(unknown)}")
    if missing := [name for name in required if name not in document]:
        raise InvalidDocumentError(f"{where} lacks {', '.join(missing)}")
    if names != [name for name in known if name in document]:
        raise InvalidDocumentError(f"{where} has its members in another order: {names}")
    for name, fits in known.items():
        if name in document and not fits(document[name]):
            raise InvalidDocumentError(f"{name} of {where} cannot be {document[name]!r}")


def _parsed(text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise InvalidDocumentError(f"a member is there twice: {[name for name, _ in pairs]}")
        return dict(pairs)

    try:
        document = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise InvalidDocumentError(f"it is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidDocumentError("it is no object")
    return document


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != "" and "\0" not in value


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and value != [] and all(map(_is_text, value))


def _is_true(value: object) -> bool:
    return value is True


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _upto(largest: int) -> Check:
    """A number that is not left out for being zero."""
    return lambda value: type(value) is int and 1 <= value <= largest


_MAPPED: dict[str, Check] = {
    "Lun": _upto(LUNS - 1),
    "Controller": _upto(3),
    "Partition": _upto((1 << 64) - 1),
    "ReadOnly": _is_true,
    "Encrypted": _is_true,
    "Options": _is_texts,
    "BlockDev": _is_true,
    "EnsureFilesystem": _is_true,
    "Filesystem": _is_text,
}
