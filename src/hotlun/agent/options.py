"""Mount options as the kernel wants them: flags, propagations, and data for the filesystem.

mount(8) does this from a table of its own; the words here are those that hcsshim's
agent takes as flags (and then leaves unused), two that newer kernels have, and
`defaults`, which says nothing. All other words are the filesystem's; so is `noacl`,
as filesystems have ACLs without the bit, too, and would pass over its absence.

The flags are mount(2)'s bits, of which fsopen(2) and its kin make two things: words
about the filesystem, which all its mounts share, and attributes of the mount alone.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from hotlun.agent.errors import RequestError
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from collections.abc import Sequence

# include/uapi/linux/mount.h
MS_RDONLY = 1 << 0
MS_NOSUID = 1 << 1
MS_NODEV = 1 << 2
MS_NOEXEC = 1 << 3
MS_SYNCHRONOUS = 1 << 4
MS_REMOUNT = 1 << 5
MS_MANDLOCK = 1 << 6
MS_DIRSYNC = 1 << 7
MS_NOSYMFOLLOW = 1 << 8
MS_NOATIME = 1 << 10
MS_NODIRATIME = 1 << 11
MS_BIND = 1 << 12
MS_REC = 1 << 14
MS_SILENT = 1 << 15
MS_POSIXACL = 1 << 16
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_I_VERSION = 1 << 23
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25

_ATIME = MS_NOATIME | MS_RELATIME | MS_STRICTATIME
"""Of these one at most holds: when the time of the last access is kept."""

_ATTRIBUTES = {
    MS_RDONLY: 0x01,
    MS_NOSUID: 0x02,
    MS_NODEV: 0x04,
    MS_NOEXEC: 0x08,
    MS_RELATIME: 0,  # the kernel's own choice
    MS_NOATIME: 0x10,
    MS_STRICTATIME: 0x20,
    MS_NODIRATIME: 0x80,
    MS_NOSYMFOLLOW: 0x200000,
}
"""What each mount of a filesystem has of its own, and how fsmount(2) calls it."""

_WORDS = {
    MS_RDONLY: "ro",
    MS_SYNCHRONOUS: "sync",
    MS_DIRSYNC: "dirsync",
    MS_MANDLOCK: "mand",
    MS_LAZYTIME: "lazytime",
}
"""What all mounts of a filesystem share, and how fsconfig(2) calls it (fs/fs_context.c)."""

_WORDLESS = MS_SILENT | MS_POSIXACL | MS_I_VERSION
_PARAMETER_MAX = 255
"""fsconfig(2) takes keys and values of so many bytes."""

_SET = {
    "acl": MS_POSIXACL,
    "dirsync": MS_DIRSYNC,
    "iversion": MS_I_VERSION,
    "lazytime": MS_LAZYTIME,
    "mand": MS_MANDLOCK,
    "noatime": MS_NOATIME,
    "nodev": MS_NODEV,
    "nodiratime": MS_NODIRATIME,
    "noexec": MS_NOEXEC,
    "nosuid": MS_NOSUID,
    "nosymfollow": MS_NOSYMFOLLOW,
    "relatime": MS_RELATIME,
    "ro": MS_RDONLY,
    "silent": MS_SILENT,
    "strictatime": MS_STRICTATIME,
    "sync": MS_SYNCHRONOUS,
}
_CLEAR = {
    "async": MS_SYNCHRONOUS,
    "atime": MS_NOATIME,
    "defaults": 0,
    "dev": MS_NODEV,
    "diratime": MS_NODIRATIME,
    "exec": MS_NOEXEC,
    "loud": MS_SILENT,
    "noiversion": MS_I_VERSION,
    "nolazytime": MS_LAZYTIME,
    "nomand": MS_MANDLOCK,
    "norelatime": MS_RELATIME,
    "nostrictatime": MS_STRICTATIME,
    "rw": MS_RDONLY,
    "suid": MS_NOSUID,
    "symfollow": MS_NOSYMFOLLOW,
}
_PROPAGATION = {
    "private": MS_PRIVATE,
    "shared": MS_SHARED,
    "slave": MS_SLAVE,
    "unbindable": MS_UNBINDABLE,
}
_NOT_FOR_DISKS = ("bind", "rbind", "move", "remount")

_NO_RECOVERY = {
    "ext3": ("noload", "norecovery"),
    "ext4": ("noload", "norecovery"),
    "xfs": ("norecovery",),
    "btrfs": ("rescue=nologreplay", "nologreplay", "norecovery"),
    "f2fs": ("norecovery",),
    "nilfs2": ("norecovery",),
}
"""How to keep a filesystem from replaying its journal on a disk that cannot be
written; the first is what we say (kernel 5.9 and up), the others mean the same."""

_DATA_MAX = 4095
"""mount(2) copies one page, its last byte a NUL; fsconfig(2) for older filesystems, too."""


class MountOptions(NamedTuple):
    """The flags, the propagations (each a call of its own), the data word by word."""

    flags: int
    propagations: tuple[int, ...]
    data: tuple[str, ...]

    @property
    def attributes(self) -> int:
        """Those of the mount, for fsmount(2)."""
        if not self.flags:
            return 0
        return sum(value for flag, value in _ATTRIBUTES.items() if self.flags & flag)

    @property
    def words(self) -> list[str]:
        """The flags of the filesystem, for fsconfig(2)."""
        return [word for flag, word in _WORDS.items() if self.flags & flag] if self.flags else []

    @property
    def per_mount(self) -> int:
        """The flags of the mount, for mount(2)."""
        return self.flags & sum(_ATTRIBUTES)

    @property
    def need_mount(self) -> bool:
        """Whether fsconfig(2) cannot say them, and mount(2) can."""
        return bool(self.flags & _WORDLESS) or any(
            len(os.fsencode(part)) > _PARAMETER_MAX
            for word in self.data
            for part in word.split("=", 1)
        )

    @property
    def joined(self) -> str:
        """The data for mount(2)."""
        return ",".join(self.data)


_NONE = MountOptions(0, (), ())


def parse(options: Sequence[str], filesystem: str = "", *, read_only: bool = False) -> MountOptions:
    """Take the words in the caller's order; a later one undoes an earlier one.

    Args:
        filesystem: the type to be mounted.
        read_only: the disk cannot be written: mounted read-only whatever the words
            say, and without recovery.

    Raises:
        RequestError: a word that no disk can be mounted with, or too many words.
    """
    if not options and not read_only:
        return _NONE
    flags = 0
    propagations = []
    data = []
    for option in options:
        if option.startswith(("ro=", "rw=")):  # the kernel passes over the value
            option = option[:2]
        recursive = MS_REC if option[:1] == "r" and option[1:] in _PROPAGATION else 0
        word = option[1:] if recursive else option
        if word in _PROPAGATION:
            propagations.append(_PROPAGATION[word] | recursive)
        elif option in _NOT_FOR_DISKS:
            raise RequestError(
                f"the mount option {option!r} is for what is mounted already, not for a disk",
                HResult.INVALID_ARGUMENT,
            )
        elif option in _SET:
            if _SET[option] & _ATIME:
                flags &= ~_ATIME
            flags |= _SET[option]
        elif option in _CLEAR:
            flags &= ~_CLEAR[option]
        elif option:
            data.append(option)
    if read_only:
        flags |= MS_RDONLY
        recovery = _NO_RECOVERY.get(filesystem, ())
        if recovery and not set(recovery) & set(data):
            data.append(recovery[0])
    try:
        length = len(os.fsencode(",".join(data)))
    except UnicodeEncodeError:
        length = _DATA_MAX + 1
    if length > _DATA_MAX or any("\0" in word for word in data):
        raise RequestError(
            f"the mount options hold a NUL, are longer than {_DATA_MAX} bytes or not text",
            HResult.INVALID_ARGUMENT,
        )
    parsed = MountOptions(flags, tuple(propagations), tuple(data))
    # in quotes it may have one: mount(2) leaves those to the security modules
    divided = next((word for word in data if "," in word and '"' not in word), None)
    if divided is not None and parsed.need_mount:
        raise RequestError(
            f"the mount option {divided[:64]!r} would be two, as other options need mount(2), "
            "which divides them at commas",
            HResult.INVALID_ARGUMENT,
        )
    return parsed
