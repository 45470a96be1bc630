"""Hot-plugged disks for running VMs: attached, mounted, shared, and taken away again."""

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
