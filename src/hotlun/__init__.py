"""Hot-plugged disks for running VMs: attached, mounted, shared, and taken away again.

What has a name here is imported when it is asked for: the command `hotlun` passes through
here too, and needs none of it to answer `--help`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotlun.backends.base import GuestBackend, HostBackend
    from hotlun.errors import (
        AlreadyReleasedError,
        BackendError,
        DiskConflictError,
        GuestPathConflictError,
        HotlunError,
        JournalError,
        NoAvailableLocationError,
        NotInitializedError,
        OutcomeUnknownError,
        SlotTakenError,
        UnsupportedError,
        VMGoneError,
        WrongKeyError,
    )
    from hotlun.manager import Manager
    from hotlun.model import (
        Attachment,
        Disk,
        DiskIdentity,
        DiskKind,
        GuestMount,
        GuestSurvey,
        ImageFormat,
        MountConfig,
        Presence,
        Secret,
        Slot,
        Verity,
    )
    from hotlun.mount_handle import Mount
    from hotlun.reconciliation import Disagreement, Finding, Resolution
    from hotlun.slots import SlotState, SlotStatus

__all__ = [  # grouped as in the documentation
    # values
    "Attachment",
    "Disk",
    "DiskIdentity",
    "DiskKind",
    "GuestMount",
    "GuestSurvey",
    "ImageFormat",
    "MountConfig",
    "Presence",
    "Secret",
    "Slot",
    "SlotState",
    "SlotStatus",
    "Verity",
    # what to do with them
    "Manager",
    "Mount",
    # what was found, and how it was settled
    "Disagreement",
    "Finding",
    "Resolution",
    # what a backend is
    "GuestBackend",
    "HostBackend",
    # what can go wrong
    "AlreadyReleasedError",
    "BackendError",
    "DiskConflictError",
    "GuestPathConflictError",
    "HotlunError",
    "JournalError",
    "NoAvailableLocationError",
    "NotInitializedError",
    "OutcomeUnknownError",
    "SlotTakenError",
    "UnsupportedError",
    "VMGoneError",
    "WrongKeyError",
]

_HOMES = ("errors", "model", "slots", "backends.base", "reconciliation", "mount_handle", "manager")
"""Where all that is defined; what imports little comes first."""

if not TYPE_CHECKING:  # which would take any name for granted

    def __getattr__(name: str) -> object:
        """One of the names above, imported."""
        if name in __all__:
            for home in _HOMES:
                found = vars(importlib.import_module(f"{__name__}.{home}")).get(name)
                if found is not None:
                    globals()[name] = found
                    return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
