"""Which filesystem is on a device, and making one where there is none of that kind.

What is there counts for more than what is asked: a filesystem that the kernel can
mount as the type asked for is never made anew, and a device that cannot be read is
an error, not an empty device.
"""

from __future__ import annotations

import errno
import os
import subprocess
from typing import TYPE_CHECKING

from hotlun.agent import superblocks, syscalls
from hotlun.agent.errors import RequestError, words
from hotlun.bridge.messages import HResult, printable

if TYPE_CHECKING:
    from hotlun.agent.kernel import Kernel
    from hotlun.agent.scsi import BlockDevice

_MAKERS = {
    # -F: do not ask about what is there (a mounted device is refused all the same);
    # the inode tables are written later, by the kernel; no discard of what is new anyway
    "ext4": (
        *("mkfs.ext4", "-F", "-q", "-E"),
        "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
    ),
    "xfs": ("mkfs.xfs", "-f", "-q", "-K"),
}
MAKEABLE = tuple(_MAKERS)

_SERVES = {"ext4": superblocks.EXT_FAMILY}
"""What need not be made anew. The ext4 driver mounts ext2 and ext3 as they are, and
the original agent, which knows one magic number for all three, leaves them alone."""

_MAKING_TIMEOUT = 240.0
"""Seconds for mkfs: less than the five minutes after which hcsshim's host gives up."""

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""For an agent that init started without one."""

_WORDS_KEPT = 1024


def detect(device: BlockDevice, wanted: tuple[str, ...] = ()) -> str:
    """What is on the device, by libblkid's name; `""` if nothing known.

    Args:
        wanted: what counts if it is there, whatever else seems to be.

    Raises:
        RequestError: it cannot be read.
    """
    try:
        return superblocks.detect(device.node, wanted)
    except OSError as error:
        raise RequestError(
            f"{device} cannot be read, so what is on it is not known: {words(error)}"
        ) from error


def detect_mountable(device: BlockDevice) -> str:
    """The type to mount the device as.

    Raises:
        RequestError: it holds nothing that can be mounted, or cannot be read.
    """
    found = detect(device)
    if found in superblocks.FILESYSTEMS:
        return found
    if found in ("gpt", "dos", "PMBR"):
        what = "a partition table; say which partition to mount"
    elif found:
        what = f"{found}, which is no filesystem"
    else:
        what = "no filesystem that is known here; say which, or have one made"
    raise RequestError(f"{device} holds {what}")


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
    if f"nodev\t{filesystem}" in kernel.read(f"{kernel.proc}/filesystems").split("\n"):
        raise RequestError(
            f"{device} cannot be mounted as {filesystem}, which is not on disks",
            HResult.INVALID_ARGUMENT,
        )


def ensure(kernel: Kernel, device: BlockDevice, wanted: str, *, read_only: bool) -> None:
    """Make a `wanted` filesystem, which the kernel has, on the device unless there is one.

    Args:
        wanted: one of `MAKEABLE`.
        read_only: the device must not be written.

    Raises:
        RequestError: it cannot be read or written, is in use, or mkfs is missing or failed.
    """
    serving = _SERVES.get(wanted, (wanted,))
    found = detect(device, serving)
    if found in serving:
        return
    if read_only or _is_read_only(kernel, device):
        raise RequestError(
            f"{device} is read-only and holds {found or 'no known filesystem'}: "
            f"no {wanted} can be made on it"
        )
    maker, *arguments = _MAKERS[wanted]
    program = _program(maker)
    if program is None:
        raise RequestError(f"{device} needs {wanted} made on it, and this guest has no {maker}")
    _refuse_if_claimed(device)
    _run(device, [program, *arguments, device.node])


def _is_read_only(kernel: Kernel, device: BlockDevice) -> bool:
    try:
        return kernel.read(os.path.join(device.sysfs, "ro")) != "0"
    except OSError:
        return False


def _refuse_if_claimed(device: BlockDevice) -> None:
    try:
        os.close(os.open(device.node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise RequestError(
                f"{device} was not formatted: it, or a part of it, is mounted or otherwise in use"
            ) from None
        raise RequestError(f"{device} cannot be opened: {words(error)}") from error


def _program(name: str) -> str | None:
    for directory in os.environ.get("PATH", _PATH).split(":"):
        path = os.path.join(directory, name)
        if directory and os.access(path, os.X_OK):
            return path
    return None


def _run(device: BlockDevice, command: list[str]) -> None:
    name = os.path.basename(command[0])
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_MAKING_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RequestError(
            f"{device}: {name} was not done after {_MAKING_TIMEOUT:g} s and was stopped",
            HResult.TIMEOUT,
        ) from None
    except OSError as error:
        raise RequestError(f"{device}: {name} cannot be run: {words(error)}") from error
    if done.returncode:
        reason, _, _ = done.stdout.decode("utf-8", "replace").partition("\nUsage:")
        said = printable(reason, _WORDS_KEPT)
        raise RequestError(f"{device}: {name} failed ({done.returncode}): {said or 'no words'}")
