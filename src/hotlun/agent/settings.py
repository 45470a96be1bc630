"""What a request about a disk says, read with suspicion.

The members of MappedVirtualDisk (hcsshim's `LCOWMappedVirtualDisk`) and SCSIDevice.
A member that is missing has the zero value of its type; others than these are
passed over. One is ours and may be sent to any agent, as the original one ignores
it: `TimeoutInMs`, how long to wait for the device, in place of the agent's default.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from hotlun.agent import options
from hotlun.agent.errors import RequestError
from hotlun.agent.filesystems import MAKEABLE
from hotlun.bridge.messages import HResult

if TYPE_CHECKING:
    from hotlun.bridge.messages import Fields

_BYTE, _WORD, _LONG = 0xFF, 0xFFFFFFFF, (1 << 64) - 1
_PATH_MAX = 4095


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


class DiskSettings(NamedTuple):
    """How (a partition of) the disk in a slot is, or was, to be mounted."""

    slot: Slot
    partition: int
    path: str
    read_only: bool
    options: tuple[str, ...]
    block_device: bool
    ensure_filesystem: bool
    filesystem: str
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
        milliseconds = fields.integer("TimeoutInMs", maximum=_WORD)
        settings = cls(
            slot=Slot.read(fields),
            partition=fields.integer("Partition", maximum=_LONG),
            path=_checked_path(fields.string("MountPath")),
            read_only=fields.boolean("ReadOnly"),
            options=tuple(fields.strings("Options")),
            block_device=fields.boolean("BlockDev"),
            ensure_filesystem=fields.boolean("EnsureFilesystem"),
            filesystem=fields.string("Filesystem"),
            timeout=milliseconds / 1000 if milliseconds else None,
        )
        if adding:
            for member in ("Encrypted", "PreserveData"):
                if fields.boolean(member):
                    raise RequestError(
                        f"disk {settings.slot}: this agent does not know {member}; "
                        "nothing was done",
                        HResult.NOT_IMPLEMENTED,
                    )
            settings.check()
        return settings

    def check(self) -> None:
        """Refuse what cannot be done to any disk, before one is touched."""
        if self.block_device:  # the rest is passed over then, as by the original agent
            return
        if self.ensure_filesystem and self.filesystem not in MAKEABLE:
            raise RequestError(
                f"disk {self.slot}: EnsureFilesystem can make {' and '.join(MAKEABLE)}, "
                f"not {self.filesystem or 'a filesystem without a name'!r}",
                HResult.INVALID_ARGUMENT,
            )
        if not self.filesystem.isascii() or "\0" in self.filesystem or "/" in self.filesystem:
            raise RequestError(
                f"disk {self.slot}: no filesystem has the name {self.filesystem!r}",
                HResult.INVALID_ARGUMENT,
            )
        options.parse(self.options)


def _checked_path(path: str) -> str:
    """The path without `//`, `.` and a slash at its end; empty stays empty."""
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
