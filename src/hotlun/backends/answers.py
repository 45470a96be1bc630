"""What a guest's answer means: the one table for its codes, whoever has carried it here. Pure.

The bridge has the code from the answer itself, the Windows compute service gives it as the
result of its operation, and may name HCS's own codes in either of their two families. 0 is done;
a failure code is not done, with the guest's words; whatever else is unknown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotlun.bridge.codes import HResult, code_name, is_failure
from hotlun.errors import BackendError, OutcomeUnknownError, WrongKeyError

if TYPE_CHECKING:
    from hotlun.errors import HotlunError
    from hotlun.model import Attachment

_ADVICE_BY_CODE: dict[int, str] = {
    HResult.NOT_IMPLEMENTED: "this agent cannot do that: run hotlun's of this version in the guest",
    HResult.UNKNOWN_MESSAGE: "this agent cannot do that: run hotlun's of this version in the guest",
    HResult.INVALID_JSON: "the agent does not understand the request: its version does not fit",
    HResult.INVALID_STATE: "something in the guest still uses it: stop that and try again",
    HResult.WRONG_DISK: "nothing was done to the disk; stop what uses it in the guest, add again",
    HResult.ALREADY_EXISTS: "nothing was written; mount it as it is, or leave out preserve_data",
    HResult.WRONG_KEY: (
        "give the key that the volume was made with, and check that this is the right disk "
        "and partition"
    ),
    HResult.NOT_FOUND: "check that the disk has that partition, and the VM that controller",
    HResult.TIMEOUT: "it took too long: is the disk attached, is the guest very busy?",
}
_ADVICE_BY_OPERATION = {
    "mount": "check partition, filesystem and options; the guest's kernel log may say more",
    "unmount": "if something in the guest still uses it, stop that; then release again",
    "unplug": "if something in the guest still uses it, stop that; then release again",
}
"""For all other codes: the original agent says FAIL to nearly everything."""

_FACILITY, _HCS = 0x1FFF0000, 0x00370000
_BY_LOW_BITS = {code & 0xFFFF: code for code in _ADVICE_BY_CODE if code & _FACILITY == _HCS}


def judge(operation: str, attachment: Attachment, where: str, code: int, text: str) -> HotlunError:
    """The error for an answer that is none of success.

    Args:
        operation: what was asked, `"mount"`, `"unmount"` or `"unplug"`.
        attachment: of which disk.
        where: the guest path as it goes into a sentence, `" at '/mnt'"`; `""` for an unplug.
        code: the result, unsigned.
        text: the guest's words.
    """
    what = f"{operation} {attachment.disk} (slot {attachment.slot}){where}"
    words = f"{text or 'no reason given'} [{code_name(code)}]"
    known = _folded(code)
    # The kernel was told to let go, and may yet do so; or it has of the path, and of no more.
    is_half_undone = operation != "mount" and known == HResult.TIMEOUT
    kind: type[HotlunError]
    if is_half_undone or not is_failure(code):
        kind = OutcomeUnknownError
        message = f"no telling whether the guest did {what}: {words}; look, then try again"
    else:
        kind = WrongKeyError if known == HResult.WRONG_KEY else BackendError
        advice = _ADVICE_BY_CODE.get(known, _ADVICE_BY_OPERATION[operation])
        message = f"the guest did not {what}: {words}; {advice}"
    return kind(
        message,
        operation=operation,
        slot=attachment.slot,
        disk=attachment.disk,
        code=code,
        detail=text,
    )


def _folded(code: int) -> int:
    """The code by which the table has it."""
    if code & _FACILITY == _HCS:
        return _BY_LOW_BITS.get(code & 0xFFFF, code)
    return code
