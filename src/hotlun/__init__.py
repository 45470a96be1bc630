"""Hot-plugged disks for running VMs: attached, mounted, shared, and taken away again."""

from hotlun.backends.base import GuestBackend, HostBackend
from hotlun.errors import (
    AlreadyReleasedError,
    BackendError,
    DiskConflictError,
    GuestPathConflictError,
    HotlunError,
    NoAvailableLocationError,
    NotInitializedError,
    OutcomeUnknownError,
    SlotTakenError,
    UnsupportedError,
    WrongKeyError,
)
from hotlun.manager import Manager, Mount
from hotlun.model import (
    Attachment,
    Disk,
    DiskIdentity,
    DiskKind,
    GuestMount,
    ImageFormat,
    MountConfig,
    Secret,
    Slot,
    Verity,
)
from hotlun.slots import SlotState, SlotStatus

__all__ = [  # grouped as in the documentation
    # values
    "Attachment",
    "Disk",
    "DiskIdentity",
    "DiskKind",
    "GuestMount",
    "ImageFormat",
    "MountConfig",
    "Secret",
    "Slot",
    "SlotState",
    "SlotStatus",
    "Verity",
    # what to do with them
    "Manager",
    "Mount",
    # what a backend is
    "GuestBackend",
    "HostBackend",
    # what can go wrong
    "AlreadyReleasedError",
    "BackendError",
    "DiskConflictError",
    "GuestPathConflictError",
    "HotlunError",
    "NoAvailableLocationError",
    "NotInitializedError",
    "OutcomeUnknownError",
    "SlotTakenError",
    "UnsupportedError",
    "WrongKeyError",
]
