"""One tree of errors; every one says what happened, to which disk and slot, and what to do next.

    HotlunError
    ├── NoAvailableLocationError    no free slot
    ├── NotInitializedError         a Manager used before it is entered or after it is left
    ├── AlreadyReleasedError        the Mount was given back before
    ├── DiskConflictError           the disk is in use in a way that this request contradicts
    ├── GuestPathConflictError      the guest path collides with another guest mount's
    ├── SlotTakenError              the hypervisor says that the slot is somebody else's
    ├── BackendError                a backend refused; `code` and `detail` are the peer's own
    │   ├── WrongKeyError           the encrypted volume does not open with this key
    │   └── VMGoneError             the hypervisor has ended, and every attachment with it
    ├── OutcomeUnknownError         it may or may not have happened
    ├── JournalError                the journal is somebody else's now, or cannot be read or written
    └── UnsupportedError            this backend or guest cannot do that; nothing was touched

`OutcomeUnknownError` is not a `BackendError`: the Manager undoes what may have
happened after the first, and takes the second at its word that nothing did.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotlun.model import Disk, Slot


class HotlunError(Exception):
    """The root of hotlun's errors.

    Args:
        message: what happened and what to do next, for a person.
        operation: the verb that failed (`"attach"`, `"unmount"`...), `""` if none was begun.
        slot: the slot concerned, if there is one.
        disk: the disk concerned, if there is one.
        code: the peer's own code, if it gave one (an HRESULT as an unsigned int, a QMP class).
        detail: the peer's own words.
    """

    def __init__(
        self,
        message: str,
        *,
        operation: str = "",
        slot: Slot | None = None,
        disk: Disk | None = None,
        code: int | str | None = None,
        detail: str = "",
    ) -> None:
        super().__init__(message)
        self.operation = operation
        self.slot = slot
        self.disk = disk
        self.code = code
        self.detail = detail


class NoAvailableLocationError(HotlunError):
    """Every slot is taken, reserved or quarantined."""


class NotInitializedError(HotlunError):
    """The Manager has not been entered yet, or has been left."""


class AlreadyReleasedError(HotlunError):
    """The Mount holds nothing any more."""


class DiskConflictError(HotlunError):
    """The disk is attached or mounted in a way that contradicts this request."""


class GuestPathConflictError(HotlunError):
    """The guest path equals, or lies above or below, another guest mount's path."""


class SlotTakenError(HotlunError):
    """The hypervisor found the slot occupied by a device that is not ours."""


class BackendError(HotlunError):
    """A backend refused: the call has not happened and left nothing behind."""


class WrongKeyError(BackendError):
    """The guest could not open the encrypted volume with the key that was given."""


class VMGoneError(BackendError):
    """The hypervisor has ended: nothing can be done, and nothing is attached any more."""


class JournalError(HotlunError):
    """The journal is another process's now, or cannot be read or written."""


class OutcomeUnknownError(HotlunError):
    """A time-out or a lost connection after sending: the call may or may not have happened."""


class UnsupportedError(HotlunError):
    """This backend or guest cannot do what was asked; nothing was touched."""
