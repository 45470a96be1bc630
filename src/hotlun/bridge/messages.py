"""The messages of the bridge: their types, the words in them, and what either end says.

The names and numbers are those of the guest compute service (hcsshim,
`internal/gcs/prot`), protocol version 4. Both ends build their documents here.

Standard library only, for Python 3.9 too: the agent inside the guest runs this file. Its values
are named tuples, as `dataclasses` takes an emulated guest 80 ms to import.
"""

from __future__ import annotations

import enum
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from hotlun.bridge.codes import signed
from hotlun.bridge.documents import MAX_TEXT, MessageError, to_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotlun.bridge.documents import Document, Fields

PROTOCOL_VERSION = 4
NULL_ID = "00000000-0000-0000-0000-000000000000"
"""The container id that means the VM itself, and the activity id of nobody in particular."""

HYPERV_PARENT_ID = "894cc2d6-9d79-424f-93fe-42969ae6d8d1"
"""The host's address of Hyper-V sockets, as a Windows guest is told it."""

ADD, REMOVE = "Add", "Remove"
MAPPED_VIRTUAL_DISK, SCSI_DEVICE = "MappedVirtualDisk", "SCSIDevice"
CONTAINER_SCRATCH = "MappedVirtualDiskForContainerScratch"
"""To add only, and only to a confidential Windows guest; it is removed as a MappedVirtualDisk."""

EXTENSION, EXTENSION_VERSION = "Hotlun", 1
"""Our member of GuestDefinedCapabilities: `{"Version": 1, "Features": [...]}`.

A peer that lists a feature does the whole of it; the original agent has no such
member, and a host that does not know it passes over it.
"""
FEATURE_OPTIONS = "options"
"""All mount options are applied, not only the propagations."""
FEATURE_FILESYSTEMS = "filesystems"
"""A filesystem that is there is recognised, ext4 or not, before one is made."""
FEATURE_PRESERVE_DATA = "preserve-data"
"""`PreserveData`: nothing is formatted over anything recognisable."""
FEATURE_IDENTITY = "identity"
"""`Serial` and `Size` of the disk: on a device with others nothing is done."""
FEATURE_KEYS = "keys"
"""`Key`, in base64: the encrypted volume is opened with it, and is there again next time."""
FEATURE_VERITY = "verity"
"""`Verity`, `{"RootHash": hex, "HashOffset": bytes}`: what was changed cannot be read."""
FEATURE_LAZY_UNMOUNT = "lazy-unmount"
"""`LazyUnmount`: a mount that is in use is taken off its path all the same."""
FEATURE_SURVEY = "survey"
"""GetProperties of the VM says what there is, if its `Query` has our member; nothing is changed.

    Query       {"Hotlun": {"Disks": [{"Controller": 0, "Lun": 1, "Serial": "...", "Mounts": [
                    {"MountPath": "/mnt", "Partition": 1, "BlockDev": ..., "Encrypted": ...,
                     "Verity": {...}}]}]}}
    Properties  {"Hotlun": {"Disks": [{"Device": "Own", "Busy": false, "Mounts": [true]}]}}

What is asked for are the members of SCSIDevice and MappedVirtualDisk that tell a device, and
not how it is mounted; a `Key` is not needed. The answer has an entry for each that was asked
for, in the same order. `Device` is one of `DEVICES`; there is none if it is missing.
`Mounts` says of each path whether this disk's device, or the partition's, or what is mapped
to that, is in sight there, mounted or as the symbolic link; none is if it is missing.
`Busy` says that the agent is still at what a host has asked for before, this one or an
earlier one: what there is may be something else in a moment.
"""
DEVICES = OWN, OTHER, UNKNOWN = "Own", "Other", "Unknown"
"""The device at a slot: has the `Serial` asked for; another; or one that is not known."""
MAX_SURVEYED_DISKS, MAX_SURVEYED_MOUNTS = 1024, 2048
"""In one query; the answer to as many fits into the 64 KiB that hcsshim's host takes."""

MAX_ACTIVITY = 128
"""Characters of an activity's id, which is given back: it is a GUID, and hosts see to that."""


class MessageType(enum.IntEnum):
    """Requests from the host, and the one notification of the guest.

    Kind (request 1, response 2, notification 3) in the highest 4 bits, then 8 of
    category, 12 of number, 8 of version.
    """

    CREATE = 0x10100101
    START = 0x10100201
    SHUTDOWN_GRACEFUL = 0x10100301
    SHUTDOWN_FORCED = 0x10100401
    EXECUTE_PROCESS = 0x10100501
    WAIT_FOR_PROCESS = 0x10100601
    SIGNAL_PROCESS = 0x10100701
    RESIZE_CONSOLE = 0x10100801
    GET_PROPERTIES = 0x10100901
    MODIFY_SETTINGS = 0x10100A01
    NEGOTIATE_PROTOCOL = 0x10100B01
    DUMP_STACKS = 0x10100C01
    DELETE_CONTAINER_STATE = 0x10100D01
    UPDATE_CONTAINER = 0x10100E01
    LIFECYCLE_NOTIFICATION = 0x10100F01
    MODIFY_SERVICE_SETTINGS = 0x10200101
    CONTAINER_NOTIFICATION = 0x30100101


_KIND_MASK = 0xF0000000
_REQUEST, _RESPONSE, _NOTIFICATION = 0x10000000, 0x20000000, 0x30000000


def is_request(kind: int) -> bool:
    return kind & _KIND_MASK == _REQUEST


def is_response(kind: int) -> bool:
    return kind & _KIND_MASK == _RESPONSE


def is_notification(kind: int) -> bool:
    return kind & _KIND_MASK == _NOTIFICATION


def response_type(request: int) -> int:
    """The type that answers a request, known or not."""
    return _RESPONSE | request & ~_KIND_MASK


def request_type(response: int) -> int:
    """The type that a response answers."""
    return _REQUEST | response & ~_KIND_MASK


@functools.lru_cache(maxsize=64)
def type_name(kind: int) -> str:
    """For logs and errors: `ModifySettings response (0x20100a01)`."""
    word = {_REQUEST: " request", _RESPONSE: " response"}.get(kind & _KIND_MASK, "")
    number = request_type(kind) if is_response(kind) else kind
    try:
        name = MessageType(number).name.title().replace("_", "")
    except ValueError:
        name = "unknown"
    return f"{name}{word} ({kind:#010x})"


# What the host says.


def _addressed(container: str) -> Document:
    return {"ContainerId": container, "ActivityId": NULL_ID}


def negotiate_request() -> Document:
    """The first message of a connection. Nothing else may be sent before its answer."""
    return {
        **_addressed(""),
        "MinimumVersion": PROTOCOL_VERSION,
        "MaximumVersion": PROTOCOL_VERSION,
    }


def create_request() -> Document:
    """Create of the VM itself, for guests that ask for it: a document in a string."""
    return {
        **_addressed(NULL_ID),
        "ContainerConfig": to_json({"SystemType": "Container", "TimeZoneInformation": None}),
    }


def start_request() -> Document:
    return _addressed(NULL_ID)


def addresses_request(runtime_id: str) -> Document:
    """Tell a Windows guest the addresses of its Hyper-V sockets: its own, and the host's."""
    settings = {"LocalAddress": runtime_id, "ParentAddress": HYPERV_PARENT_ID}
    return modify_request(
        {"RequestType": "Update", "ResourceType": "HvSocket", "Settings": settings}
    )


def modify_request(request: Mapping[str, Any]) -> Document:
    """The envelope of `{"RequestType": ..., "ResourceType": ..., "Settings": {...}}`."""
    return {**_addressed(NULL_ID), "Request": request}


def properties_request(query: Mapping[str, Any]) -> Document:
    """Ask for properties of the VM; of ours, with `{"Hotlun": {...}}`: a document in a string."""
    return {**_addressed(NULL_ID), "Query": to_json(query)}


class ModifyRequest(NamedTuple):
    """A modify request as the guest reads it."""

    request_type: str
    resource_type: str
    settings: Fields

    @classmethod
    def read(cls, document: Fields) -> ModifyRequest:
        """From the document in the envelope; without a RequestType it is an Add.

        Raises:
            MessageError: `Request` or its `Settings` is missing, or something is of a wrong type.
        """
        request = document.fields("Request")
        settings = request.fields("Settings")
        if not request.document and "Request" not in document:
            raise MessageError("Request is missing")
        if not settings.document and "Settings" not in request:
            raise MessageError("Settings is missing")
        return cls(request.string("RequestType") or ADD, request.string("ResourceType"), settings)


def activity_of(document: Fields) -> str:
    """The id by which the host knows its request, to be given back with the answer.

    Raises:
        MessageError: it is none, or so long that an answer with it could be too large.
    """
    activity = document.string("ActivityId")
    if len(activity) > MAX_ACTIVITY:
        raise MessageError(f"ActivityId has {len(activity)} characters, more than {MAX_ACTIVITY}")
    return activity


# What the guest says.


def response(code: int = 0, message: str = "", *, activity_id: str = "", **more: Any) -> Document:
    """An answer; `more` are the members of its own that it has besides.

    Args:
        code: the result, signed or not.
        message: what went wrong, at most `MAX_TEXT` characters of it.
        activity_id: the request's, given back.
    """
    document: Document = {"Result": signed(code)}
    if activity_id:
        document["ActivityId"] = activity_id
    if message:
        message = message if len(message) <= MAX_TEXT else message[: MAX_TEXT - 1] + "…"
        document["ErrorMessage"] = message
        document["ErrorRecords"] = [
            {
                "Result": signed(code),
                "Message": message,
                "ModuleName": "hotlun",
                "FileName": "",
                "Line": 0xFFFFFFFF,
            }
        ]
    return {**document, **more}


def properties_response(properties: Mapping[str, Any], *, activity_id: str = "") -> Document:
    """The answer to GetProperties."""
    return response(activity_id=activity_id, Properties=to_json(properties))


def negotiate_response(features: list[str], *, activity_id: str = "") -> Document:
    """The answer of a Linux guest that can all that is in `features` (see `EXTENSION`)."""
    capabilities: Document = {
        "SupportedSchemaVersions": [{"Major": 2, "Minor": 1}],
        "RuntimeOsType": "Linux",
        "GuestDefinedCapabilities": {
            EXTENSION: {"Version": EXTENSION_VERSION, "Features": features}
        },
    }
    return response(activity_id=activity_id, Version=PROTOCOL_VERSION, Capabilities=capabilities)
