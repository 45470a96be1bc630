"""Which filesystem is on a device, and making one where there is none of that kind.

What is there counts for more than what is asked: a filesystem that the kernel can
mount as the type asked for is never made anew, and a device that cannot be read is
an error, not an empty device.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from hotlun.agent import holders, programs, superblocks, syscalls
from hotlun.agent.errors import RequestError, words
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hotlun.agent.blkid import Content
    from hotlun.agent.block_devices import BlockDevice
    from hotlun.agent.kernel import Kernel

_MAKERS = {
    # -F: do not ask about what is there (a mounted device is refused all the same);
    # the inode tables are written later, by the kernel; no discard of what is new anyway
    "ext4": (
        *("mkfs.ext4", "-F", "-q", "-E"),
        "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
    ),
    "xfs": ("mkfs.xfs", "-f", "-q", "-K"),
    "btrfs": ("mkfs.btrfs", "-f", "-q", "-K"),
}
MAKEABLE = tuple(_MAKERS)

_SERVES = {"ext4": superblocks.EXT_FAMILY}
"""What need not be made anew. The ext4 driver mounts ext2 and ext3 as they are, and
the original agent, which knows one magic number for all three, leaves them alone."""


def detect(device: BlockDevice, wanted: tuple[str, ...] = ()) -> str:
    """What is on the device, by libblkid's name; `""` if nothing known.

    Args:
        wanted: what counts if it is there, whatever else seems to be.

    Raises:
        RequestError: it cannot be read.
    """
    names = _look(device).names
    return next((name for name in names if name in wanted), names[0] if names else "")


def detect_mountable(device: BlockDevice) -> str:
    """The type to mount the device as.

    Raises:
        RequestError: it holds nothing that can be mounted, or more than one thing that
            can be, or cannot be read.
    """
    names, ambivalent = _look(device)
    if names and names[0] in superblocks.FILESYSTEMS and not ambivalent:
        return names[0]
    if len(names) > 1 and superblocks.FILESYSTEMS.intersection(names):
        what = f"the marks of {' and '.join(names)}; say as which to mount it"
    elif names and names[0] in superblocks.PARTITION_TABLES:
        what = "a partition table; say which partition to mount"
    elif names:
        what = f"{' and '.join(names)}, which is no filesystem"
    else:
        what = "no filesystem that is known here; say which, or have one made"
    raise RequestError(f"{device} holds {what}")


def is_known(filesystem: str) -> bool:
    """Whether it is one that is on disks; that the kernel lacks it, the mount itself will say."""
    return filesystem in superblocks.FILESYSTEMS


def check_type(kernel: Kernel, device: BlockDevice, filesystem: str) -> None:
    """Refuse a type that this guest cannot mount from a device.

    Raises:
        RequestError: the kernel does not have it, or it would not look at the device.
    """
    if not syscalls.knows_filesystem(filesystem):
        raise RequestError(
            f"{device} cannot be mounted as {filesystem}: this guest's kernel has no such "
            "filesystem"
        )
    if is_known(filesystem):
        return
    if f"nodev\t{filesystem}" in kernel.read(f"{kernel.proc}/filesystems").split("\n"):
        raise RequestError(
            f"{device} cannot be mounted as {filesystem}, which is not on disks",
            HResult.INVALID_ARGUMENT,
        )


def ensure(
    kernel: Kernel,
    device: BlockDevice,
    wanted: str,
    *,
    read_only: bool,
    preserve_data: bool = False,
) -> None:
    """Make a `wanted` filesystem, which the kernel has, on the device unless there is one.

    Args:
        wanted: one of `MAKEABLE`.
        read_only: the device must not be written.
        preserve_data: make it only where nothing at all is recognised; nor is one taken
            for what was wanted that has anything else beside it: a partition table, a
            container that it shows through, another filesystem. One of them is old, and
            to write to that is to lose the other.

    Raises:
        RequestError: it cannot be read or written, is in use, or holds what is to be
            preserved; or mkfs is missing or failed.
    """
    with _claimed(device) as claimed:
        names = _look(device).names
        serving = _SERVES.get(wanted, (wanted,))
        if any(name in serving for name in names):
            if not preserve_data or all(name in serving for name in names):
                return
            raise RequestError(
                f"{device} holds {' and '.join(names)}, and its data is to be preserved: which "
                f"of them is alive is not known, so it is not mounted as {wanted}",
                HResult.ALREADY_EXISTS,
            )
        found = " and ".join(names)
        if read_only or _is_read_only(kernel, device):
            raise RequestError(
                f"{device} is read-only and holds {found or 'no known filesystem'}: "
                f"no {wanted} can be made on it"
            )
        if preserve_data:
            _refuse_data(device, names, wanted)
        if not claimed:
            users = holders.users(kernel, device.sysfs)
            raise RequestError(
                f"{device} was not formatted: it, or a part of it, is mounted or otherwise in use"
                + "".join(f"; {user}" for user in users),
                HResult.INVALID_STATE,
            )
    make(device, wanted)


def make(device: BlockDevice, wanted: str, arguments: Sequence[str] = ()) -> None:
    """Make a filesystem, whatever the device holds.

    Args:
        wanted: one of `MAKEABLE`.
        arguments: for mkfs, after the usual ones, which they can undo: of an option given
            twice mkfs.ext4 takes the last.

    Raises:
        RequestError: mkfs is missing, failed, or is not done in time.
    """
    programs.run(device, [*_maker(device, wanted), *arguments, device.node], node=device.node)


def check_maker(device: BlockDevice, wanted: str) -> None:
    """Refuse what `make` has no program for.

    Raises:
        RequestError: the guest has none.
    """
    _maker(device, wanted)


def check_blank(device: BlockDevice, wanted: str) -> None:
    """Refuse a device that anything at all is recognised on.

    Raises:
        RequestError: it holds something, or cannot be read.
    """
    _refuse_data(device, _look(device).names, wanted)


def _maker(device: BlockDevice, wanted: str) -> tuple[str, ...]:
    name, *usual = _MAKERS[wanted]
    program = programs.find(name)
    if program is None:
        raise RequestError(f"{device} needs {wanted} made on it, and this guest has no {name}")
    return program, *usual


def _look(device: BlockDevice) -> Content:
    try:
        return superblocks.look(device.node)
    except OSError as error:
        raise RequestError(
            f"{device} cannot be read, so what is on it is not known: {words(error)}"
        ) from error


def _refuse_data(device: BlockDevice, names: Sequence[str], wanted: str) -> None:
    if names:
        raise RequestError(
            f"{device} holds {' and '.join(names)}, and its data is to be preserved: "
            f"no {wanted} was made on it",
            HResult.ALREADY_EXISTS,
        )


def _is_read_only(kernel: Kernel, device: BlockDevice) -> bool:
    try:
        return kernel.read(os.path.join(device.sysfs, "ro")) != "0"
    except OSError:
        return False


@contextlib.contextmanager
def _claimed(device: BlockDevice) -> Iterator[bool]:
    """Hold the device so that no mkfs and no mount begins; gives whether that can be done.

    Raises:
        RequestError: it cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        is_claimed = False
        try:
            flags = os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK
            stack.callback(os.close, os.open(device.node, flags))
            is_claimed = True
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise RequestError(f"{device} cannot be opened: {words(error)}") from error
        yield is_claimed
