"""The values that everything else speaks in: frozen, hashable, validated when built."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from hotlun.mount_config import PROPAGATIONS, MountConfig, Verity
from hotlun.secret import Secret

__all__ = [
    "PROPAGATIONS",
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
    "Verity",
]


class DiskKind(StrEnum):
    """What the host offers. The values are the HCS attachment types."""

    VIRTUAL_DISK = "VirtualDisk"
    """An image file: VHD, VHDX, qcow2 or raw."""
    PHYSICAL_DISK = "PassThru"
    """A block device of the host."""
    EXTENSIBLE_VIRTUAL_DISK = "ExtensibleVirtualDisk"
    """A disk served by a provider: `evd://<provider>/<path>`."""


class ImageFormat(StrEnum):
    """How the bytes of an image file are to be read. Stated, never probed."""

    RAW = "raw"
    QCOW2 = "qcow2"
    VHD = "vhd"
    VHDX = "vhdx"


@dataclass(frozen=True, order=True, slots=True)
class Slot:
    """One (controller, LUN) position, both counted from 0."""

    controller: int
    lun: int

    def __post_init__(self) -> None:
        if self.controller < 0 or self.lun < 0:
            raise ValueError(f"controller and LUN are counted from 0: {self}")

    def __str__(self) -> str:
        return f"{self.controller}:{self.lun}"


@dataclass(frozen=True, slots=True)
class Disk:
    """What the host offers: where it is, what it is, and whether it may be written.

    `provider` names the server of an extensible virtual disk and is empty for
    every other kind. `format` is None where the host backend needs none, or
    where nobody said.
    """

    path: str
    kind: DiskKind
    read_only: bool = False
    provider: str = ""
    format: ImageFormat | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("a disk needs a path")
        if "\0" in self.path or "\0" in self.provider:
            raise ValueError(f"a disk's path holds no NUL: {self.path!r}")
        if type(self.kind) is not DiskKind:
            object.__setattr__(self, "kind", DiskKind(self.kind))
        if self.format is not None and type(self.format) is not ImageFormat:
            object.__setattr__(self, "format", ImageFormat(self.format))
        if (self.kind is DiskKind.EXTENSIBLE_VIRTUAL_DISK) != bool(self.provider):
            raise ValueError("an extensible virtual disk, and no other, has a provider")

    def __str__(self) -> str:
        return f"evd://{self.provider}/{self.path}" if self.provider else self.path


_SERIAL = re.compile(r"[a-z][a-z0-9]{0,19}")


@dataclass(frozen=True, slots=True)
class Attachment:
    """A disk occupying a slot, visible to the guest kernel.

    `serial` is made once per attachment and never used again: up to 20
    characters of `[a-z][a-z0-9]*`. It is the SCSI serial that the guest reads
    and part of the ids that QEMU knows the disk by.
    """

    slot: Slot
    disk: Disk
    serial: str

    def __post_init__(self) -> None:
        if not _SERIAL.fullmatch(self.serial):
            raise ValueError(f"a serial is at most 20 of [a-z][a-z0-9]*: {self.serial!r}")


@dataclass(frozen=True, slots=True)
class DiskIdentity:
    """What the guest can know a disk by, before it does anything to it.

    Args:
        serial: the SCSI serial; `""` if the host cannot give the disk one.
        size: in bytes, as the guest sees it; None if that is not certain.
    """

    serial: str = ""
    size: int | None = None


@dataclass(frozen=True, slots=True)
class GuestMount:
    """(A partition of) an attachment mounted at an absolute path inside the guest.

    `identity` is what the guest should find at the slot, as far as the host knows it.
    """

    attachment: Attachment
    path: str
    config: MountConfig
    identity: DiskIdentity | None = field(default=None, compare=False)

    @property
    def read_only(self) -> bool:
        """Follows the disk."""
        return self.attachment.disk.read_only


class Presence(StrEnum):
    """How much of an attachment the hypervisor has."""

    ABSENT = "absent"
    PARTIAL = "partial"
    """Some of it, or all of it and not as it was attached: it can only be undone."""
    PRESENT = "present"
    UNKNOWN = "unknown"
    """The hypervisor does not say of this one."""


@dataclass(frozen=True, slots=True)
class GuestSurvey:
    """What a guest has of the attachments and guest mounts that it was asked for.

    Args:
        devices: the serials of those attachments whose own disk is at their slot.
        mounts: those of the guest mounts that are at their path, on their own disk.
        busy: the serials of those disks to which something is still being done that was asked
            for before: what is said of them may be otherwise in a moment.
    """

    devices: frozenset[str] = frozenset()
    mounts: frozenset[GuestMount] = frozenset()
    busy: frozenset[str] = frozenset()
