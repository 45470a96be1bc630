"""A filesystem gets mounted: by fsopen(2) and its kin, so that the kernel says what is wrong.

mount(2) says EINVAL for all that it does not like. It remains for kernels before 5.2,
and for the options that only it can be told.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from hotlun.agent import options, syscalls
from hotlun.agent.errors import words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotlun.agent.options import MountOptions

_HINTS = {
    errno.ENODEV: "this guest's kernel has no such filesystem",
    errno.EINVAL: (
        "not such a filesystem, a damaged one, one of smaller blocks than the device has, or an "
        "option that it does not know"
    ),
    errno.EACCES: "the device is read-only, and the mount was to be writable",
    errno.EROFS: "the device is read-only, and the filesystem wants to write to it",
    errno.EBUSY: "in use otherwise, or mounted elsewhere read-only and here not, or the reverse",
}
"""What the kernel may not say itself; of what is invalid it speaks clearly, if at all."""


class MountingError(Exception):
    """The kernel did not do it; the message is what it said."""

    def __init__(self, error: OSError, said: Sequence[str] = ()) -> None:
        hint = _HINTS.get(error.errno or 0)
        text = ": ".join((words(error), *(("; ".join(said),) if said else ())))
        if hint and not (said and error.errno == errno.EINVAL):
            text += f" ({hint})"
        super().__init__(text)
        self.errno = error.errno


def mount(
    node: str, filesystem: str, asked: MountOptions, directory: int, *, read_only: bool
) -> int:
    """Mount a device; gives a descriptor of the mount, which keeps it busy.

    All mounts of a filesystem share whether it is writable; one that is not to
    be, beside one that is, has that as a property of the mount alone. What else
    belongs to the filesystem (`sync`, data) is as its first mount has it; the
    kernel passes over what the second says.

    Args:
        directory: a descriptor of where.
        read_only: the device itself is.

    Raises:
        MountingError: it is not mounted.
    """
    try:
        if asked.need_mount:
            return _by_mount(node, filesystem, asked, directory, read_only=read_only)
        try:
            mounted = _by_fsopen(node, filesystem, asked, read_only=read_only)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            return _by_mount(node, filesystem, asked, directory, read_only=read_only)
        try:
            syscalls.move_mount(mounted, directory)
        except OSError:
            os.close(mounted)
            raise
        return mounted
    except OSError as error:
        raise MountingError(error) from error


def undo(mounted: int) -> None:
    """Have the very mount that a descriptor is of gone, and the descriptor closed.

    Raises:
        OSError: it is still there.
    """
    try:
        syscalls.detach(mounted)
    finally:
        os.close(mounted)


def adjust(mounted: int, asked: MountOptions) -> None:
    """Have the mount that a descriptor is of have the flags of its own that were asked for.

    Raises:
        MountingError: it has not.
    """
    _change(mounted, options.MS_REMOUNT | options.MS_BIND | asked.per_mount)


def propagate(mounted: int, asked: MountOptions) -> None:
    """Set how the mount that a descriptor is of takes part in what is mounted elsewhere.

    Only once it is where it belongs: in a shared mount all that is put there is shared.

    Raises:
        MountingError: not all of it is set.
    """
    for propagation in asked.propagations:
        _change(mounted, propagation)


def _change(mounted: int, flags: int) -> None:
    try:
        syscalls.mount("", syscalls.path_of(mounted), "", flags)
    except OSError as error:
        raise MountingError(error) from error


def _by_fsopen(node: str, filesystem: str, asked: MountOptions, *, read_only: bool) -> int:
    """A mount that is nowhere yet."""
    superblock = asked.words
    try:
        return _new_mount(node, filesystem, asked, superblock)
    except MountingError as error:
        if error.errno != errno.EBUSY or read_only or "ro" not in superblock:
            raise
    superblock.remove("ro")
    return _new_mount(node, filesystem, asked, superblock)


def _new_mount(node: str, filesystem: str, asked: MountOptions, superblock: list[str]) -> int:
    context = syscalls.fsopen(filesystem)
    try:
        syscalls.set_parameter(context, f"source={node}")
        for word in (*asked.data, *superblock):
            syscalls.set_parameter(context, word)
        syscalls.create_superblock(context)
        return syscalls.fsmount(context, asked.attributes)
    except OSError as error:
        raise MountingError(error, syscalls.said(context)) from error
    finally:
        os.close(context)


def _by_mount(
    node: str, filesystem: str, asked: MountOptions, directory: int, *, read_only: bool
) -> int:
    target = syscalls.path_of(directory)
    _check_upon(target, directory)
    try:
        syscalls.mount(node, target, filesystem, asked.flags, asked.joined)
        beside_writable = False
    except OSError as error:
        beside_writable = bool(asked.flags & options.MS_RDONLY) and not read_only
        if error.errno != errno.EBUSY or not beside_writable:
            raise
        flags = asked.flags & ~options.MS_RDONLY
        syscalls.mount(node, target, filesystem, flags, asked.joined)
    upon = _upon(target)
    try:
        mounted = os.open(upon, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        syscalls.unmount(upon, syscalls.MNT_DETACH)
        raise
    if beside_writable:
        try:
            adjust(mounted, asked)
        except MountingError:
            undo(mounted)
            raise
    return mounted


def _upon(target: str) -> str:
    """What is mounted on a directory, by a path from its descriptor, which leads below that.

    Up and down again leads upon it, by a name that stays: what is mounted on is not renamed.
    """
    return f"{target}/../{os.path.basename(os.readlink(target))}"


def _check_upon(target: str, directory: int) -> None:
    """Refuse a directory whose folder is mounted on, as what is mounted below is not found again.

    Raises:
        OSError: the way up from it leads out of there.
    """
    found, own = os.stat(_upon(target), follow_symlinks=False), os.fstat(directory)
    if (found.st_dev, found.st_ino) != (own.st_dev, own.st_ino):
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), target)
