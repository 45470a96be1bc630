"""What the frames of the bridge say: types, codes, documents, and reading them with suspicion.

The names and numbers are those of the guest compute service (hcsshim,
`internal/gcs/prot`), protocol version 4. Both ends build their documents here,
and both read the other's as hostile input: bounded depth, bounded numbers, every
field checked for its type, and one error, `MessageError`, for all that is wrong.

Standard library only, for Python 3.9 too: the agent inside the guest runs this file. Its values
are named tuples, as `dataclasses` takes an emulated guest 80 ms to import.
"""

from __future__ import annotations

import enum
import functools
import json
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

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

MAX_DEPTH = 32
MAX_TEXT = 4096
"""Characters of an error text that are sent or shown: hcsshim's host takes 64 KiB frames."""
MAX_ACTIVITY = 128
"""Characters of an activity's id, which is given back: it is a GUID, and hosts see to that."""

Document = dict[str, Any]


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


class HResult(enum.IntEnum):
    """The result codes that guests give, unsigned; the highest bit says failure."""

    OK = 0
    NOT_IMPLEMENTED = 0x80004001
    FAIL = 0x80004005
    WRONG_DISK = 0x80070022
    """Win32's ERROR_WRONG_DISK: the disk that is there is not the one that is meant."""
    INVALID_ARGUMENT = 0x80070057
    ALREADY_EXISTS = 0x800700B7
    """Win32's: there is data, which is to be preserved."""
    NOT_FOUND = 0x80070490
    TIMEOUT = 0xC0370109
    UNKNOWN_MESSAGE = 0xC037010B
    UNSUPPORTED_PROTOCOL_VERSION = 0xC037010C
    INVALID_JSON = 0xC037010D
    SYSTEM_NOT_FOUND = 0xC037010E
    SYSTEM_ALREADY_EXISTS = 0xC037010F
    SYSTEM_ALREADY_STOPPED = 0xC0370110
    INVALID_STATE = 0x80370105
    WRONG_KEY = 0x80310027
    """BitLocker's FVE_E_FAILED_AUTHENTICATION: no volume can be opened with this key."""


def signed(code: int) -> int:
    """A result as it goes over the wire: 32 bits with a sign."""
    code &= 0xFFFFFFFF
    return code - (1 << 32) if code & 0x80000000 else code


def is_failure(code: int) -> bool:
    """Whether an unsigned result says that it was definitely not done."""
    return bool(code & 0x80000000)


def code_name(code: int) -> str:
    """For errors: `0x80004005 (FAIL)`."""
    try:
        return f"{code:#010x} ({HResult(code).name})"
    except ValueError:
        return f"{code:#010x}"


def printable(text: str, limit: int = MAX_TEXT) -> str:
    """One line that is safe in a log or a terminal, at most `limit` characters.

    Lines become parts separated by `; `, control and other unprintable characters
    their escapes.
    """
    if not text:  # as with most answers
        return ""
    lines = (line.strip() for line in text[: 2 * limit].splitlines())
    line = "; ".join(line for line in lines if line)
    if not line.isprintable():
        line = "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
            for char in line
        )
    return line if len(line) <= limit else line[: limit - 1] + "…"


class MessageError(ValueError):
    """The document is not JSON, or not what the protocol says it is."""


def encode_request(document: Mapping[str, Any]) -> bytes:
    """Compact UTF-8 JSON, members in their order, ended by one newline as hcsshim's host does.

    Raises:
        MessageError: a string that UTF-8 cannot hold, or a value that JSON cannot.
    """
    try:
        return (_to_json(document) + "\n").encode()
    except (TypeError, ValueError) as error:
        problem = str(error)
    # Not chained: the codec's error keeps the whole document, and there may be a key in it.
    raise MessageError(f"no document can hold that: {problem}")


def encode_response(document: Mapping[str, Any]) -> bytes:
    """As `encode_request`, without the newline; what UTF-8 cannot hold is escaped."""
    if tuple(document) == ("Result", "ActivityId"):
        return _short_response(document["Result"], document["ActivityId"])
    return _to_json(document).encode("utf-8", "backslashreplace")


@functools.lru_cache(maxsize=16)
def _short_response(result: int, activity_id: str) -> bytes:
    """Most answers say no more than that it is done, and hosts have few ids for what they do."""
    document = {"Result": result, "ActivityId": activity_id}
    return _to_json(document).encode("utf-8", "backslashreplace")


def _to_json(document: Mapping[str, Any]) -> str:
    return _ENCODER.encode(document)


def decode(payload: bytes) -> Fields:
    """Read a document. Of members given twice the last counts.

    Raises:
        MessageError: not UTF-8, not JSON, not an object, nested deeper than
            `MAX_DEPTH`, or with a number of more than 20 digits.
    """
    try:
        text = payload.decode().strip(_BLANKS)
        document, end = _DECODER.raw_decode(text)  # decode() looks for blanks with two regexes
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except MessageError:
        raise
    except RecursionError:
        raise MessageError(f"nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise MessageError(f"not a JSON document: {error}") from None
    if not isinstance(document, dict):
        raise MessageError(f"not a JSON object but {_kind_of(document)}")
    # Mostly there are not enough brackets for that.
    if payload.count(b"{") + payload.count(b"[") > MAX_DEPTH and _is_deep(document):
        raise MessageError(f"nested deeper than {MAX_DEPTH}")
    return Fields(document)


def _is_deep(document: Document) -> bool:
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        if not level:
            break
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    return bool(level)


def _parse_integer(digits: str) -> int:
    if len(digits) > 21:
        raise MessageError(f"a number of {len(digits)} digits")
    return int(digits)


def _refuse_constant(word: str) -> None:
    raise MessageError(f"{word} is not JSON")


# Made once: json.dumps() and json.loads() with arguments of ours make one each time.
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_DECODER = json.JSONDecoder(parse_int=_parse_integer, parse_constant=_refuse_constant)
_BLANKS = " \t\n\r"


def _between(minimum: int, maximum: int) -> str:
    return f"a whole number, {minimum} to {maximum}"


def _kind_of(value: object) -> str:
    return {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}.get(
        type(value), "null" if value is None else "a number"
    )


_SPELLED = frozenset(
    (
        *("ContainerId", "ActivityId", "Request", "RequestType", "ResourceType", "Settings"),
        *("Controller", "Lun", "Partition", "MountPath", "ReadOnly", "Options", "Filesystem"),
        *("Encrypted", "BlockDev", "EnsureFilesystem", "PreserveData", "LazyUnmount"),
        *("Serial", "Size", "Key", "Verity", "RootHash", "HashOffset", "TimeoutInMs"),
        *("Result", "ErrorMessage", "ErrorRecords"),
    )
)
"""Members that are asked for just so: where there are no others, none has to be looked for
without regard to case."""


class Fields:
    """An object of a document: members found without regard to case, checked for type.

    A member that is missing or null has the default, as in the original agent.
    Each getter raises `MessageError`, naming the member, for a value of another type.
    """

    # The getters that a request is read by look themselves: mostly there is nothing to find,
    # and a call more would cost an emulated guest as much as all that they do.

    __slots__ = ("_odd", "_where", "document")

    def __init__(self, document: Mapping[str, Any], where: str = "") -> None:
        self.document = document
        self._where = where
        self._odd: dict[str, Any] | None = None
        """Members that may be spelled otherwise than they are asked for, in lower case."""
        if not _SPELLED.issuperset(document):
            self._odd = {
                name.lower(): value for name, value in document.items() if name not in _SPELLED
            }

    def __contains__(self, name: str) -> bool:
        return self._get(name) is not None

    def string(self, name: str, default: str = "") -> str:
        value = self.document.get(name)
        if value is None and self._odd is not None:
            value = self._odd.get(name.lower())
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def boolean(self, name: str) -> bool:
        value = self.document.get(name)
        if value is None and self._odd is not None:
            value = self._odd.get(name.lower())
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self._wrong(name, value, "a boolean")
        return value

    def integer(self, name: str, *, minimum: int = 0, maximum: int, default: int | None = 0) -> int:
        """Default None: the member must be there."""
        value = self.document.get(name)
        if value is None and self._odd is not None:
            value = self._odd.get(name.lower())
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(name, value, _between(minimum, maximum))
        if not minimum <= value <= maximum:
            expected = _between(minimum, maximum)
            raise MessageError(f"{self._where}{name} is {value}, not {expected}")
        return value

    def strings(self, name: str) -> list[str]:
        value = self._get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, value, "an array of strings")
        return value

    def booleans(self, name: str) -> list[bool]:
        value = self._get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, bool) for item in value):
            raise self._wrong(name, value, "an array of booleans")
        return value

    def fields(self, name: str) -> Fields:
        """The object in a member; an empty one by default (see `in`)."""
        value = self._get(name)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return Fields(value, f"{self._where}{name}.")

    def objects(self, name: str) -> list[Fields]:
        value = self._get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._wrong(name, value, "an array of objects")
        return [Fields(item, f"{self._where}{name}.") for item in value]

    def _get(self, name: str) -> Any:
        value = self.document.get(name)
        if value is None and self._odd is not None:
            value = self._odd.get(name.lower())
        return value

    def _wrong(self, name: str, value: object, expected: str) -> MessageError:
        return MessageError(f"{self._where}{name} is {_kind_of(value)}, not {expected}")


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
        "ContainerConfig": _to_json({"SystemType": "Container", "TimeZoneInformation": None}),
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
    return {**_addressed(NULL_ID), "Query": _to_json(query)}


def embedded(document: Fields, name: str) -> Fields:
    """The document in a string; an empty one if the string is empty or not there.

    Raises:
        MessageError: it is no string, or holds what `decode` refuses.
    """
    text = document.string(name)
    try:
        return decode(text.encode()) if text else Fields({})
    except ValueError as error:
        raise MessageError(f"{name}: {error}") from None


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
    return response(activity_id=activity_id, Properties=_to_json(properties))


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


# What the host reads of it.


class Response(NamedTuple):
    """An answer to a request: `code` is unsigned, `text` the guest's words in one line."""

    code: int
    text: str
    fields: Fields

    @classmethod
    def read(cls, payload: bytes) -> Response:
        """Read an answer.

        Only `Result` must be right; words that are none are left out.

        Raises:
            MessageError: it does not say how the request went.
        """
        fields = decode(payload)
        code = fields.integer("Result", minimum=-(1 << 31), maximum=(1 << 32) - 1, default=None)
        return cls(code & 0xFFFFFFFF, _error_text(fields), fields)


def _error_text(fields: Fields) -> str:
    try:
        text = printable(fields.string("ErrorMessage"))
        if not text:
            records = fields.objects("ErrorRecords")[:8]
            text = printable("\n".join(record.string("Message") for record in records))
    except MessageError:
        return ""
    return text


class Capabilities(NamedTuple):
    """What a guest says of itself when it answers Negotiate.

    `os_type` is in lower case; `features` are those of our extension, none for
    a peer that does not know it or speaks another version of it.
    """

    os_type: str
    send_create: bool
    send_start: bool
    features: frozenset[str]
    fields: Fields

    @classmethod
    def read(cls, fields: Fields) -> Capabilities:
        """From the member `Capabilities`.

        Raises:
            MessageError: a member is of a wrong type.
        """
        extension = fields.fields("GuestDefinedCapabilities").fields(EXTENSION)
        known = extension.integer("Version", maximum=(1 << 32) - 1) == EXTENSION_VERSION
        return cls(
            os_type=printable(fields.string("RuntimeOsType"), 32).lower() or "windows",
            send_create=fields.boolean("SendHostCreateMessage"),
            send_start=fields.boolean("SendHostStartMessage"),
            features=frozenset(extension.strings("Features") if known else ()),
            fields=fields,
        )
