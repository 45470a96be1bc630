"""The values that everything else speaks in: frozen, hashable, validated when built."""

from __future__ import annotations

import re
from collections.abc import Sequence  # noqa: TC003 - dataclass fields are read at run time
from dataclasses import dataclass, field
from enum import StrEnum


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
        if self.format is not None:
            object.__setattr__(self, "format", ImageFormat(self.format))
        if (self.kind is DiskKind.EXTENSIBLE_VIRTUAL_DISK) != bool(self.provider):
            raise ValueError("an extensible virtual disk, and no other, has a provider")

    def __str__(self) -> str:
        return f"evd://{self.provider}/{self.path}" if self.provider else self.path


PROPAGATIONS = frozenset(
    prefix + word for word in ("private", "shared", "slave", "unbindable") for prefix in ("", "r")
)
"""The options that say how mounts below spread between namespaces, not how this one is."""
_OPPOSITES = (("ro", "rw"), ("sync", "async"), ("loud", "silent"))
_FILESYSTEM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class MountConfig:
    """How (a partition of) a disk is mounted inside the guest.

    Two configs are equal when they would produce the same mount: order and
    repeats of `options` make no difference there, and are kept for the wire.

    Args:
        partition: which one, from 1; 0 is the whole disk.
        encrypted: under a random key that is thrown away on unmount.
        options: mount options, one an item (`"noatime"`, `"data=ordered"`, `"rshared"`).
        ensure_filesystem: format if there is no `filesystem` on it yet.
        filesystem: its type, or `""` to mount what is there.
        block_device: no mount; the guest path becomes a symlink to the device.
        preserve_data: never format over anything recognisable.

    Raises:
        ValueError: the parts contradict each other.
        TypeError: `options` is a single string, or holds something else than strings.
    """

    partition: int = 0
    encrypted: bool = False
    options: Sequence[str] = field(default=(), compare=False)
    ensure_filesystem: bool = False
    filesystem: str = ""
    block_device: bool = False
    preserve_data: bool = False
    _option_set: frozenset[str] = field(init=False, repr=False, default=frozenset())

    def __post_init__(self) -> None:
        if self.options != ():
            options = _checked_options(self.options)
            object.__setattr__(self, "options", options)
            object.__setattr__(self, "_option_set", frozenset(options))
        if self.partition < 0:
            raise ValueError(
                f"partitions are counted from 1, 0 is the whole disk: {self.partition}"
            )
        if self.filesystem and not _FILESYSTEM_NAME.fullmatch(self.filesystem):
            raise ValueError(f"no filesystem has this name: {self.filesystem!r}")
        if self.block_device and (
            self.filesystem
            or self.options
            or self.ensure_filesystem
            or self.encrypted
            or self.preserve_data
        ):
            raise ValueError(
                "block_device gives the bare device: it goes with no filesystem, options, "
                "ensure_filesystem, encrypted or preserve_data"
            )
        if self.ensure_filesystem and not self.filesystem:
            raise ValueError("ensure_filesystem needs to know which: give filesystem")
        if self.preserve_data and not self.ensure_filesystem:
            raise ValueError("preserve_data guards a format: it goes with ensure_filesystem")
        if self.encrypted and not self.ensure_filesystem:
            raise ValueError(
                "encrypted throws its key away, so there is never a filesystem to find: "
                "it needs ensure_filesystem"
            )

    @property
    def may_format(self) -> bool:
        """Whether mounting may write a new filesystem."""
        return self.ensure_filesystem or self.encrypted

    def overlaps(self, other: MountConfig) -> bool:
        """Whether both speak of some of the same sectors."""
        return not self.partition or not other.partition or self.partition == other.partition


def _checked_options(options: Sequence[str]) -> tuple[str, ...]:
    if isinstance(options, (str, bytes)):
        raise TypeError("options is a sequence of strings, one option an item")
    options = tuple(options)
    values: dict[str, str] = {}
    propagation = ""
    for option in options:
        if not isinstance(option, str):
            raise TypeError(f"a mount option is a string: {option!r}")
        if not option or "\0" in option or ("," in option and '"' not in option):
            raise ValueError(f"one mount option an item, not empty, no comma, no NUL: {option!r}")
        key, _, value = option.partition("=")
        if values.setdefault(key, value) != value:
            raise ValueError(f"the mount option {key} is given two values")
        if option in PROPAGATIONS:
            if propagation not in ("", option):
                raise ValueError(f"two propagations: {propagation} and {option}")
            propagation = option
    for option in options:
        if f"no{option}" in values:
            raise ValueError(f"mount options contradict each other: {option} and no{option}")
    for one, other in _OPPOSITES:
        if one in values and other in values:
            raise ValueError(f"mount options contradict each other: {one} and {other}")
    return options


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
class GuestMount:
    """(A partition of) an attachment mounted at an absolute path inside the guest."""

    attachment: Attachment
    path: str
    config: MountConfig

    @property
    def read_only(self) -> bool:
        """Follows the disk."""
        return self.attachment.disk.read_only
