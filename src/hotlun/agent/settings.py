"""What a request about a disk says, read with suspicion.

The members of MappedVirtualDisk (hcsshim's `LCOWMappedVirtualDisk`) and SCSIDevice.
A member that is missing has the zero value of its type; others than these are
passed over. Ours, beyond hcsshim's, which a host sends only to an agent that announces
the feature (`messages.FEATURE_...`):

| member | |
|---|---|
| PreserveData | boolean: make a filesystem only where nothing is recognised |
| Serial, Size | what the disk is known by: its SCSI serial, and bytes of the whole disk |
| Key | base64: opens a LUKS volume that stays; `Encrypted` without it keeps no key |
| Verity | {RootHash: hexadecimal, HashOffset: bytes, 0 for right behind the filesystem} |
| LazyUnmount | boolean, of a Remove: detach a mount that is busy |
| TimeoutInMs | how long to wait for the device, in place of the agent's default; needs no feature |
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from typing import TYPE_CHECKING, NamedTuple

from hotlun.agent import options
from hotlun.agent.errors import RequestError
from hotlun.agent.filesystems import MAKEABLE
from hotlun.agent.vpd import Identity
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from hotlun.bridge.documents import Fields

_BYTE, _WORD, _LONG = 0xFF, 0xFFFFFFFF, (1 << 64) - 1
_PATH_MAX = 4095
_KEY_MAX = 4096
_ROOT_HASH = r"(?:[0-9a-f]{2}){16,64}"
_SECTOR = 512


class Slot(NamedTuple):
    """A position as the host counts it: the controller in its order, the LUN on target 0."""

    controller: int
    lun: int

    def __str__(self) -> str:
        return f"{self.controller}:{self.lun}"

    @classmethod
    def read(cls, fields: Fields) -> Slot:
        """From the members Controller and Lun.

        Raises:
            MessageError: they are not numbers from 0 to 255.
        """
        return cls(
            fields.integer("Controller", maximum=_BYTE), fields.integer("Lun", maximum=_BYTE)
        )


class Verity(NamedTuple):
    """The root of a tree of hashes, and where in the device the tree lies."""

    root_hash: str
    hash_offset: int

    @classmethod
    def read(cls, fields: Fields) -> Verity:
        """From the members RootHash and HashOffset.

        Raises:
            MessageError: they are of another type than they should be.
            RequestError: they make no sense.
        """
        root_hash = fields.string("RootHash").lower()
        offset = fields.integer("HashOffset", maximum=(1 << 62))
        if not re.fullmatch(_ROOT_HASH, root_hash) or offset % _SECTOR:
            raise RequestError(
                "Verity needs a RootHash of 32 to 128 hexadecimal digits and a HashOffset in "
                f"whole sectors of {_SECTOR} bytes",
                HResult.INVALID_ARGUMENT,
            )
        return cls(root_hash, offset)


class Key:
    """The caller's key. It shows nowhere: not in a log, not in a traceback's values."""

    def __init__(self, value: bytes) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Key(...)"


class DiskSettings(NamedTuple):
    """How (a partition of) the disk in a slot is, or was, to be mounted."""

    slot: Slot
    partition: int
    path: str
    read_only: bool
    encrypted: bool
    options: tuple[str, ...]
    block_device: bool
    ensure_filesystem: bool
    filesystem: str
    preserve_data: bool
    identity: Identity
    key: Key | None
    verity: Verity | None
    lazy: bool
    timeout: float | None

    @classmethod
    def read(cls, fields: Fields, *, adding: bool) -> DiskSettings:
        """From a request's Settings.

        Args:
            adding: refuse what this agent cannot do; a Remove needs little of it.

        Raises:
            MessageError: a member is of another type than it should be.
            RequestError: a value makes no sense, or asks for what this agent cannot do.
        """
        settings = cls(
            slot=Slot.read(fields),
            partition=fields.integer("Partition", maximum=_LONG),
            path=checked_path(fields.string("MountPath")),
            read_only=fields.boolean("ReadOnly"),
            encrypted=fields.boolean("Encrypted"),
            options=tuple(fields.strings("Options")),
            block_device=fields.boolean("BlockDev"),
            ensure_filesystem=fields.boolean("EnsureFilesystem"),
            filesystem=fields.string("Filesystem"),
            preserve_data=fields.boolean("PreserveData"),
            identity=Identity(
                fields.string("Serial"), fields.integer("Size", maximum=_LONG) or None
            ),
            key=_key(fields.string("Key")),
            verity=Verity.read(fields.fields("Verity")) if "Verity" in fields else None,
            lazy=fields.boolean("LazyUnmount"),
            timeout=read_timeout(fields),
        )
        if adding:
            settings.check()
        return settings

    @property
    def has_layers(self) -> bool:
        """Whether it is not the device itself that is mounted, but what is mapped to it."""
        return self.verity is not None or (self.encrypted and not self.block_device)

    @property
    def digest(self) -> bytes:
        """Stands for all that the mount is made from, the key excepted."""
        slot, *plain, identity, key, verity, _lazy, _timeout = self
        told = (*slot, *plain, *identity, key is not None, verity)
        return hashlib.sha256(repr(told).encode()).hexdigest()[:32].encode()

    def check(self) -> None:
        """Refuse what cannot be done to any disk, before one is touched."""

        def refuse(problem: str) -> RequestError:
            return RequestError(f"disk {self.slot}: {problem}", HResult.INVALID_ARGUMENT)

        if self.key is not None and (self.block_device or not self.encrypted):
            raise refuse("a Key opens what is Encrypted, and no BlockDev")
        if self.verity is not None and not self.read_only:
            raise refuse("Verity is for a disk that is ReadOnly")
        if self.block_device:  # the rest is passed over then, as by the original agent
            return
        if self.ensure_filesystem and self.filesystem not in MAKEABLE:
            *most, last = MAKEABLE
            raise refuse(
                f"EnsureFilesystem can make {', '.join(most)} and {last}, "
                f"not {self.filesystem or 'a filesystem without a name'!r}"
            )
        if self.encrypted and not self.ensure_filesystem and self.key is None:
            raise refuse(
                "Encrypted without EnsureFilesystem finds nothing: the key of before is gone"
            )
        if self.encrypted and self.read_only and self.key is None:
            raise refuse("Encrypted under a new key writes the disk, and it is ReadOnly")
        if self.verity is not None and (self.encrypted or self.ensure_filesystem):
            raise refuse("Verity is for what is there, not for Encrypted or EnsureFilesystem")
        if not self.filesystem.isascii() or "\0" in self.filesystem or "/" in self.filesystem:
            raise refuse(f"no filesystem has the name {self.filesystem!r}")
        options.parse(self.options)


def read_timeout(fields: Fields) -> float | None:
    """Seconds that the host allows for the device, None if it does not say.

    Raises:
        MessageError: it is no number of milliseconds.
    """
    milliseconds = fields.integer("TimeoutInMs", maximum=_WORD)
    return milliseconds / 1000 if milliseconds else None


def _key(text: str) -> Key | None:
    if not text:
        return None
    try:
        value = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):  # whose words would be about the key
        value = b""
    if not 0 < len(value) <= _KEY_MAX:
        raise RequestError(
            f"the Key is not the base64 of 1 to {_KEY_MAX} bytes", HResult.INVALID_ARGUMENT
        )
    return Key(value)


def checked_path(path: str) -> str:
    """The path without `//`, `.` and a slash at its end; empty stays empty.

    Raises:
        RequestError: nothing can be mounted there.
    """
    if not path:
        return ""
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise RequestError(
            f"the mount path {path!r} is not an absolute path without `..`",
            HResult.INVALID_ARGUMENT,
        )
    try:
        length = len(os.fsencode(path))
    except UnicodeEncodeError:
        length = _PATH_MAX + 1
    if length > _PATH_MAX:
        raise RequestError(
            f"the mount path {path[:64]!r}... is longer than {_PATH_MAX} bytes or not text",
            HResult.INVALID_ARGUMENT,
        )
    path = "/" + os.path.normpath(path).lstrip("/")
    if path == "/":
        raise RequestError("nothing can be mounted at /", HResult.INVALID_ARGUMENT)
    return path
