"""The one table that turns the service's HRESULTs into ours, and its error documents into words.

HCS has two families of codes that mean the same: 0x8037nnnn is documented for computecore.dll,
0xC037nnnn is older, and what a guest's own agent answers. Win32 errors come as 0x8007nnnn. All
are looked up by their low 16 bits, each facility on its own.
"""

from __future__ import annotations

import json
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, NamedTuple

from hotlun.errors import BackendError, OutcomeUnknownError

if TYPE_CHECKING:
    from collections.abc import Iterator

_FACILITY = 0x1FFF0000
_HCS, _WIN32, _VHD = 0x00370000, 0x00070000, 0x003A0000
_MOST_EVENTS = 16
_MOST_TEXT = 4096
"""Characters of what is told: a guest may have written it."""


class Meaning(Enum):
    """What a code means for what is to be done next."""

    REFUSED = auto()
    """For a person to settle."""
    ABSENT = auto()
    """There is no such attachment."""
    MISSING = auto()
    """There is no such file."""
    SLOT_TAKEN = auto()
    VM_GONE = auto()
    UNKNOWN = auto()
    """Nobody was told how it ended."""
    NOT_HERE = auto()
    """This Windows does not have the function."""


class Refusal(NamedTuple):
    """A code understood: its name, what happened, and what to do, in words."""

    name: str
    meaning: Meaning
    words: str
    advice: str


_START_AGAIN = "every attachment went with the VM: start it, and attach anew"
_LOOK_FIRST = "it may or may not have been done: see whether the VM still runs, then undo or retry"
_VERSION = "the Windows here is too old or too new for it; tell us its version"

_HCS_TABLE: dict[int, tuple[str, Meaning, str, str]] = {
    0x100: ("TERMINATED_DURING_START", Meaning.VM_GONE, "the VM died starting", _START_AGAIN),
    0x101: ("IMAGE_MISMATCH", Meaning.REFUSED, "the guest's system does not fit the host's", ""),
    0x102: (
        "HYPERV_NOT_INSTALLED",
        Meaning.REFUSED,
        "a feature of Windows is missing",
        "turn on Hyper-V and the Virtual Machine Platform, and restart",
    ),
    0x103: ("OPERATION_PENDING_V1", Meaning.UNKNOWN, "it goes on", _LOOK_FIRST),
    0x105: (
        "INVALID_STATE",
        Meaning.REFUSED,
        "the VM, or the device, is not in a state for that",
        "wait until the VM runs and is not paused or saved, then try again",
    ),
    0x106: ("UNEXPECTED_EXIT", Meaning.VM_GONE, "the VM has ended unexpectedly", _START_AGAIN),
    0x107: ("TERMINATED", Meaning.VM_GONE, "the VM was ended by force", _START_AGAIN),
    0x108: (
        "CONNECT_FAILED",
        Meaning.REFUSED,
        "the service has no connection to the guest",
        "wait until the guest has booted; its VM document needs a GuestConnection",
    ),
    0x109: ("CONNECTION_TIMEOUT", Meaning.UNKNOWN, "the guest did not answer", _LOOK_FIRST),
    0x10A: (
        "CONNECTION_CLOSED",
        Meaning.UNKNOWN,
        "the connection to the guest was closed",
        _LOOK_FIRST,
    ),
    0x10B: (
        "UNKNOWN_MESSAGE",
        Meaning.REFUSED,
        "the guest does not know this kind of request",
        "run a guest agent that knows it",
    ),
    0x10C: (
        "UNSUPPORTED_PROTOCOL_VERSION",
        Meaning.REFUSED,
        "service and guest have no version of their protocol in common",
        "run another version of the guest agent",
    ),
    0x10D: ("INVALID_JSON", Meaning.REFUSED, "the document was not understood", _VERSION),
    0x10E: (
        "SYSTEM_NOT_FOUND",
        Meaning.VM_GONE,
        "there is no VM with this id",
        "give the id that `enumerate_systems()` shows, or start the VM",
    ),
    0x10F: ("SYSTEM_ALREADY_EXISTS", Meaning.REFUSED, "the id is another system's", ""),
    0x110: ("SYSTEM_ALREADY_STOPPED", Meaning.VM_GONE, "the VM does not run", _START_AGAIN),
    0x111: ("PROTOCOL_ERROR", Meaning.UNKNOWN, "host and guest misunderstood", _LOOK_FIRST),
    0x112: ("INVALID_LAYER", Meaning.REFUSED, "the layer's format is not known", ""),
    0x113: ("WINDOWS_INSIDER_REQUIRED", Meaning.REFUSED, "only Insider builds can do that", ""),
    0x114: (
        "SERVICE_NOT_AVAILABLE",
        Meaning.REFUSED,
        "the service lacks a feature or does not run",
        "start the service vmcompute, and look into the event log Hyper-V-Compute",
    ),
    0x115: ("OPERATION_NOT_STARTED", Meaning.REFUSED, "the operation was not begun", ""),
    0x116: ("OPERATION_ALREADY_STARTED", Meaning.REFUSED, "the operation was used twice", ""),
    0x117: ("OPERATION_PENDING", Meaning.UNKNOWN, "it goes on", _LOOK_FIRST),
    0x118: ("OPERATION_TIMEOUT", Meaning.UNKNOWN, "it goes on", _LOOK_FIRST),
    0x119: (
        "OPERATION_SYSTEM_CALLBACK_ALREADY_SET",
        Meaning.REFUSED,
        "another callback is set on the system",
        "",
    ),
    0x11A: (
        "OPERATION_RESULT_ALLOCATION_FAILED",
        Meaning.UNKNOWN,
        "there was no memory for the result",
        _LOOK_FIRST,
    ),
    0x11B: (
        "ACCESS_DENIED",
        Meaning.REFUSED,
        "this user may not use the service",
        "run as a member of Administrators or Hyper-V Administrators",
    ),
    0x11C: (
        "GUEST_CRITICAL_ERROR",
        Meaning.UNKNOWN,
        "the guest has reported a critical fault",
        _LOOK_FIRST,
    ),
    0x11D: ("PROCESS_INFO_NOT_AVAILABLE", Meaning.REFUSED, "there is no process information", ""),
    0x11E: (
        "SERVICE_DISCONNECT",
        Meaning.UNKNOWN,
        "the service vmcompute went away",
        "it may or may not have been done: open the system again, look, then undo or retry",
    ),
    0x11F: ("PROCESS_ALREADY_STOPPED", Meaning.REFUSED, "the process has ended already", ""),
}
"""HCS_E_*, by the low 16 bits of both families."""

_CUT_OFF = "it was cut off", _LOOK_FIRST
_MISSING = "give a path that exists on this host, and that this user may look at"

_WIN32_TABLE: dict[int, tuple[str, Meaning, str, str]] = {
    0x02: ("ERROR_FILE_NOT_FOUND", Meaning.MISSING, "there is no such file", _MISSING),
    0x03: ("ERROR_PATH_NOT_FOUND", Meaning.MISSING, "there is no such folder", _MISSING),
    0x05: (
        "ERROR_ACCESS_DENIED",
        Meaning.REFUSED,
        "access is denied",
        (
            "give the VM's id as vm_id, so that it may open the disk; changing a file's access "
            "takes WRITE_DAC on it, and the service Administrators or Hyper-V Administrators"
        ),
    ),
    0x06: ("ERROR_INVALID_HANDLE", Meaning.REFUSED, "the system was closed", "open it again"),
    0x0D: ("ERROR_INVALID_DATA", Meaning.REFUSED, "the document was not understood", _VERSION),
    0x20: (
        "ERROR_SHARING_VIOLATION",
        Meaning.REFUSED,
        "somebody else has the disk open",
        "end that use: another VM or slot, a mounted image, a backup",
    ),
    0x32: ("ERROR_NOT_SUPPORTED", Meaning.REFUSED, "that is not supported here", _VERSION),
    0x50: ("ERROR_FILE_EXISTS", Meaning.SLOT_TAKEN, "there is something already", ""),
    0x57: ("ERROR_INVALID_PARAMETER", Meaning.REFUSED, "a value is not accepted", _VERSION),
    0x79: ("ERROR_SEM_TIMEOUT", Meaning.UNKNOWN, *_CUT_OFF),
    0x7F: ("ERROR_PROC_NOT_FOUND", Meaning.NOT_HERE, "this Windows lacks the function", _VERSION),
    0xB7: ("ERROR_ALREADY_EXISTS", Meaning.SLOT_TAKEN, "there is something already", ""),
    0x102: ("WAIT_TIMEOUT", Meaning.UNKNOWN, *_CUT_OFF),
    0x3E3: ("ERROR_OPERATION_ABORTED", Meaning.UNKNOWN, *_CUT_OFF),
    0x3E5: ("ERROR_IO_PENDING", Meaning.UNKNOWN, "it goes on", _LOOK_FIRST),
    0x490: (
        "ERROR_NOT_FOUND",
        Meaning.ABSENT,
        "there is no such controller or attachment",
        "the VM document has to declare the controller: see hcs_document()",
    ),
    0x4C7: ("ERROR_CANCELLED", Meaning.UNKNOWN, *_CUT_OFF),
    0x570: (
        "ERROR_FILE_CORRUPT",
        Meaning.REFUSED,
        "it is no intact image",
        "repair it, or check that it is a VHD or VHDX",
    ),
    0x5B4: ("ERROR_TIMEOUT", Meaning.UNKNOWN, *_CUT_OFF),
    0x6BA: ("RPC_S_SERVER_UNAVAILABLE", Meaning.REFUSED, "the service does not run", ""),
    0x6BE: ("RPC_S_CALL_FAILED", Meaning.UNKNOWN, "the service went away", _LOOK_FIRST),
    0x6BF: ("RPC_S_CALL_FAILED_DNE", Meaning.REFUSED, "the service went away before it began", ""),
    0x71A: ("RPC_S_CALL_CANCELLED", Meaning.UNKNOWN, *_CUT_OFF),
    0x71C: ("RPC_S_COMM_FAILURE", Meaning.UNKNOWN, "the service went away", _LOOK_FIRST),
}
"""Win32 errors that are to be expected; hcsshim names the first six of them."""

_COM_TABLE: dict[int, tuple[str, Meaning, str, str]] = {
    0x8000000A: ("E_PENDING", Meaning.UNKNOWN, "it goes on", _LOOK_FIRST),
    0x80004001: ("E_NOTIMPL", Meaning.NOT_HERE, "this Windows cannot do that", _VERSION),
    0x80004004: ("E_ABORT", Meaning.UNKNOWN, *_CUT_OFF),
    0x80004005: ("E_FAIL", Meaning.REFUSED, "it failed", ""),
    0x8000FFFF: ("E_UNEXPECTED", Meaning.UNKNOWN, "it went wrong halfway", _LOOK_FIRST),
    0x80010002: ("RPC_E_CALL_CANCELED", Meaning.UNKNOWN, *_CUT_OFF),
    0x80010006: ("RPC_E_CONNECTION_TERMINATED", Meaning.UNKNOWN, *_CUT_OFF),
    0x80010007: ("RPC_E_SERVER_DIED", Meaning.UNKNOWN, *_CUT_OFF),
    0x80010012: ("RPC_E_SERVER_DIED_DNE", Meaning.REFUSED, "it was cut off before it began", ""),
    0x80010105: ("RPC_E_SERVERFAULT", Meaning.UNKNOWN, "it went wrong halfway", _LOOK_FIRST),
    0x80010108: ("RPC_E_DISCONNECTED", Meaning.UNKNOWN, *_CUT_OFF),
    0x8001011F: ("RPC_E_TIMEOUT", Meaning.UNKNOWN, *_CUT_OFF),
    0x8007000E: ("E_OUTOFMEMORY", Meaning.REFUSED, "there is not enough memory", ""),
    0xC03A001A: (
        "ERROR_VIRTUAL_DISK_LIMITATION",
        Meaning.REFUSED,
        "the image file is compressed, encrypted or sparse",
        "copy it into a plain file",
    ),
}
"""Whole codes, looked up first."""

_ANY_VHD = (
    "an error of VHD",
    Meaning.REFUSED,
    "the image is damaged, or in a format that is not known",
    "repair it, or check that it is a VHD or VHDX",
)
"""For the facility of whatever reads images."""


def unsigned(code: int) -> int:
    """An HRESULT as people write it: the int32 of a call as 0x8nnnnnnn."""
    return code & 0xFFFFFFFF


def understand(code: int) -> Refusal:
    """What a code means, signed or unsigned."""
    code = unsigned(code)
    row = _COM_TABLE.get(code)
    if row is None and code & _FACILITY == _HCS:
        row = _HCS_TABLE.get(code & 0xFFFF)
        if row is not None:
            row = ("HCS_E_" + row[0], *row[1:])
    elif row is None and code & _FACILITY == _WIN32:
        row = _WIN32_TABLE.get(code & 0xFFFF)
    elif row is None and code & _FACILITY == _VHD:
        row = _ANY_VHD
    return Refusal(*(row or ("an HRESULT", Meaning.REFUSED, "the service refuses", "")))


def error_text(document: str) -> str:
    """The words of a ResultError document, in one line to show; `""` if there are none in it.

    All of it is optional, and what is not as documented is passed over (hcsshim does the same).
    """
    try:
        read = json.loads(document)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(read, dict):
        return ""
    events = read.get("ErrorEvents")
    found = [_text(read, "ErrorMessage")]
    if isinstance(events, list):
        found += [_text(event, "Message") for event in events[:_MOST_EVENTS]]
    text = "; ".join(dict.fromkeys(filter(None, found)))
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 1] + "…"


def failure(code: int, document: str = "") -> BackendError | OutcomeUnknownError:
    """The error for an HRESULT, signed or not, that is none of success, and its ResultError."""
    refusal, said = understand(code), error_text(document)
    kind = OutcomeUnknownError if refusal.meaning is Meaning.UNKNOWN else BackendError
    words = "; ".join(_clauses(refusal, unsigned(code), said))
    return kind(words, code=unsigned(code), detail=said)


def _clauses(refusal: Refusal, code: int, said: str) -> Iterator[str]:
    yield f"{refusal.words} [{refusal.name}, 0x{code:08X}]"
    if said:
        yield f"the service says: {said}"
    yield refusal.advice or "the event log Hyper-V-Compute may say more"


def _text(read: Any, name: str) -> str:
    value = read.get(name) if isinstance(read, dict) else None
    if not isinstance(value, str):
        return ""
    text = " ".join(value[: 2 * _MOST_TEXT].split())
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )
