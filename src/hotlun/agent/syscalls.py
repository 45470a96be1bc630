"""The system calls about mounts and disks, which Python has no functions for.

Eight times faster than /bin/mount, which is mostly fork, exec and loading libraries.
The numbers are those of Linux 5.2 and 5.6, the same on every architecture that Python runs on.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import stat
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

# include/uapi/linux/mount.h
_FSOPEN_CLOEXEC = 1
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_FSMOUNT_CLOEXEC = 1
_MOVE_MOUNT_F_EMPTY_PATH = 0x04
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_OPEN_TREE_CLONE = 1
_AT_EMPTY_PATH = 0x1000

_MESSAGE_MAX = 4096

_AT_FDCWD = -100
_RESOLVE_NO_SYMLINKS = 0x04
_STRAIGHT = struct.pack("=QQQ", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, _RESOLVE_NO_SYMLINKS)
"""struct open_how (include/uapi/linux/openat2.h): the flags, a mode, how a path is resolved."""
_STRAIGHT_SIZE = ctypes.c_size_t(len(_STRAIGHT))

_SYNC_ALL = 7
"""SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER (include/uapi/linux/fs.h)."""

# include/uapi/linux/stat.h
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_NO_AUTOMOUNT = 0x800
_AT_STATX_DONT_SYNC = 0x4000
_STATX_TYPE, _STATX_MODE, _STATX_UID = 0x1, 0x2, 0x8
_STATX_INO = 0x100
_STATX_MNT_ID = 0x1000
_STATX_ATTR_MOUNT_ROOT = 0x2000
_STATX = struct.Struct("I4xQ4xI4xH2xQ96xIIQ104x")
"""stx_mask, _attributes, _uid, _mode, _ino, _dev_major, _dev_minor, _mnt_id"""

_Status = ctypes.c_char * _STATX.size

_LOOKED_FOR = _STATX_TYPE | _STATX_MODE | _STATX_UID | _STATX_MNT_ID

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
# The number differs, the function is there since glibc 2.28 and musl 1.2.
# What is given to this and to the system calls below is of the types that ctypes makes of it by
# itself. To have it check them first takes an emulated guest as long as the smaller calls do.
_statx = getattr(_libc, "statx", None)


def _syscall(number: int) -> Callable[..., int]:
    """A function of its own for one system call. Integers are given to it as C's `int`."""
    function = _libc["syscall"]  # unlike an attribute, a new object each time
    function.restype = ctypes.c_long
    return functools.partial(function, ctypes.c_long(number))


_openat2 = _syscall(437)
_open_tree = _syscall(428)
_move_mount = _syscall(429)
_fsopen = _syscall(430)
_fsconfig = _syscall(431)
_fsmount = _syscall(432)


def path_of(descriptor: int) -> str:
    """What a descriptor is open on, as a path for calls that take nothing else.

    The kernel goes from it straight to the file, wherever that was moved meanwhile.
    """
    return f"/proc/self/fd/{descriptor}"


def mount(source: str, target: str, filesystem: str, flags: int, data: str = "") -> None:
    """mount(2).

    Raises:
        OSError: what the kernel said, about `target`.
    """
    failed = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        os.fsencode(filesystem),
        flags,
        os.fsencode(data) or None,
    )
    if failed:
        raise _error(target)


def unmount(target: str, flags: int = 0) -> None:
    """umount2(2), without following a symbolic link at its end.

    Raises:
        OSError: what the kernel said, about `target`.
    """
    if _libc.umount2(os.fsencode(target), flags | UMOUNT_NOFOLLOW):
        raise _error(target)


def detach(mounted: int) -> None:
    """Take away the very mount that a descriptor is of; it ends when that is closed.

    Raises:
        OSError: what the kernel said.
    """
    path = path_of(mounted)
    if _libc.umount2(os.fsencode(path), MNT_DETACH):
        raise _error(path)


def fsopen(filesystem: str) -> int:
    """fsopen(2): the descriptor to say by what is to be mounted, and how.

    Raises:
        OSError: what the kernel said; ENODEV if it has no such filesystem.
    """
    return _descriptor(_fsopen(os.fsencode(filesystem), _FSOPEN_CLOEXEC), filesystem)


def set_parameter(context: int, parameter: str) -> None:
    """fsconfig(2) with a `key=value` or a single word.

    Raises:
        OSError: what the kernel said; `said` has it in words.
    """
    key, divider, value = parameter.partition("=")
    if _fsconfig(
        context,
        _FSCONFIG_SET_STRING if divider else _FSCONFIG_SET_FLAG,
        os.fsencode(key),
        os.fsencode(value) if divider else None,
        0,
    ):
        raise _error(parameter)


def create_superblock(context: int) -> None:
    """fsconfig(2), all being said: have the filesystem look at the device.

    Raises:
        OSError: what the kernel said; `said` may have it in words.
    """
    if _fsconfig(context, _FSCONFIG_CMD_CREATE, None, None, 0):
        raise _error("")


def said(context: int) -> list[str]:
    """What the kernel has to say about what was asked, in words, such as
    `ext4: Unknown parameter 'foo'`."""
    lines: list[str] = []
    while True:
        try:
            line = os.read(context, _MESSAGE_MAX)
        except OSError:  # ENODATA: that was all
            return lines
        lines.append(line.decode("utf-8", "replace")[2:].strip())  # after its class, `e `


def fsmount(context: int, attributes: int) -> int:
    """fsmount(2): a mount that is nowhere yet, by a descriptor.

    Raises:
        OSError: what the kernel said.
    """
    return _descriptor(_fsmount(context, _FSMOUNT_CLOEXEC, attributes), "")


def move_mount(mounted: int, directory: int) -> None:
    """move_mount(2): put a mount onto a directory, both by descriptor.

    Raises:
        OSError: what the kernel said.
    """
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
    if _move_mount(mounted, b"", directory, b"", flags):
        raise _error(path_of(directory))


def uncovered(directory: int) -> int:
    """open_tree(2): an open directory without what is mounted below it, by a descriptor.

    Raises:
        OSError: what the kernel said.
    """
    flags = _OPEN_TREE_CLONE | _AT_EMPTY_PATH | os.O_CLOEXEC
    return _descriptor(_open_tree(directory, b"", flags), path_of(directory))


def open_straight(folder: str) -> int | None:
    """openat2(2): a folder by a path on which nothing is a link.

    None if something is one, or if it cannot be opened so for whatever reason: Linux has this
    since 5.6, and what is wrong with a folder, open(2) will say.
    """
    opened = _openat2(_AT_FDCWD, os.fsencode(folder), _STRAIGHT, _STRAIGHT_SIZE)
    return None if opened < 0 else opened


class Seen(NamedTuple):
    """What there is at a path: the id and the device (`8:1`) of the mount that is rooted there.

    Its mode and owner are those of stat(2); a mode of 0 says that they are not known.
    """

    is_directory: bool
    mount: str
    device: str
    mode: int = 0
    owner: int = 0


def look(folder: int, name: str) -> Seen | None:
    """statx(2), in a folder, without following a link; None if this does not tell.

    So it is before Linux 5.8, and on some filesystems whose disk is gone.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if _statx is None:
        return None
    found = _Status()
    flags = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT
    if _statx(folder, os.fsencode(name), flags, _LOOKED_FOR, found):
        if ctypes.get_errno() == errno.ENOENT:
            raise _error(name)
        return None
    mask, attributes, owner, mode, _, major, minor, number = _STATX.unpack(found)
    if not mask & _STATX_MNT_ID:
        return None
    if not attributes & _STATX_ATTR_MOUNT_ROOT:
        return Seen(stat.S_ISDIR(mode), "", "", mode, owner)
    return Seen(stat.S_ISDIR(mode), str(number), f"{major}:{minor}", mode, owner)


def identity(folder: int, path: str = "") -> tuple[int, ...] | None:
    """statx(2): what only this folder has, as it is reached through this mount.

    None where `look` does not tell either, or it cannot be reached.

    Args:
        path: from the folder to the one that is meant; if that is a link, it is not followed.
    """
    if _statx is None:
        return None
    found = _Status()
    flags = _AT_EMPTY_PATH | _AT_SYMLINK_NOFOLLOW | _AT_STATX_DONT_SYNC
    if _statx(folder, os.fsencode(path), flags, _STATX_INO | _STATX_MNT_ID, found):
        return None
    mask, _, _, _, *told = _STATX.unpack(found)
    return tuple(told) if mask & _STATX_MNT_ID else None


def knows_filesystem(name: str) -> bool:
    """Whether the kernel can mount this type, after loading its module if need be."""
    try:
        os.close(fsopen(name))
    except OSError as error:
        return error.errno != errno.ENODEV
    return True


def write_back(disk: int) -> None:
    """sync_file_range(2): have all be written to a disk that was given to it by its descriptor.

    Unlike fsync(2) it does not have the disk empty its own cache, which one that is gone
    cannot. So it fails only if something is lost, and tells that once.

    Raises:
        OSError: something is, as it could not be written.
    """
    if _libc.sync_file_range(disk, 0, 0, _SYNC_ALL):
        raise _error("")


def _descriptor(result: int, about: str) -> int:
    if result < 0:
        raise _error(about)
    return result


def _error(path: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path)
