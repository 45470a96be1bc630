"""The result codes of the bridge: how a guest says what became of a request.

Windows' HRESULTs: signed in a document, unsigned everywhere else here.

Standard library only, for Python 3.9 too: the agent inside the guest runs this file.
"""

from __future__ import annotations

import enum


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
