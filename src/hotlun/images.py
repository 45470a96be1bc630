"""What a disk image is, found out without trusting it.

The format is stated by who attaches the disk; here it is only checked that the
file can be what is claimed. The checks look where the container's own metadata
is and never at bytes that a guest may have written: a raw image is not looked
into at all, whatever it resembles.

An image can name other files - a backing file, an external data file, a parent
- and a hypervisor that follows such a name opens whatever the image's author
wished. So these are refused. One exception: the backing file of a qcow2 whose
name the caller has allowed, and whose format the image states.

Truncation is told from a cheap hint first (the last cluster that is counted, the
footer behind the data), and only where that looks wrong from the block tables: a
writer that was killed leaves space in use behind the end of the file that nobody
misses.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from hotlun.containers import qcow2, vhd, vhdx
from hotlun.containers.file import SECTOR, Contents, ImageFile
from hotlun.errors import BackendError
from hotlun.model import ImageFormat

if TYPE_CHECKING:
    from collections.abc import Collection

    from hotlun.containers.file import Backing

_BACKING_FORMATS = {
    "raw": ImageFormat.RAW,
    "qcow2": ImageFormat.QCOW2,
    "vpc": ImageFormat.VHD,
    "vhdx": ImageFormat.VHDX,
}


class Image(NamedTuple):
    """An image file that has been checked.

    Args:
        path: where it is, with symbolic links resolved.
        format: as stated.
        size: of the disk in it as QEMU shows it to a guest, in bytes; None if it is not certain.
        backing: the image below, which the caller has allowed by name.
    """

    path: str
    format: ImageFormat
    size: int | None
    backing: Image | None = None

    @property
    def below(self) -> tuple[str, ...]:
        """The paths of the images that this one rests on, the nearest first."""
        return (self.backing.path, *self.backing.below) if self.backing else ()


def check_image(
    path: str | os.PathLike[str],
    stated: ImageFormat,
    *,
    allow_backing: Collection[str] = (),
) -> Image:
    """Check that the file can be an image of the stated format; it is only ever read.

    Args:
        path: the image file.
        stated: the format that somebody says it has.
        allow_backing: paths that a qcow2 may name as its backing file.

    Raises:
        BackendError: there is no such file, it is not a regular one, not of this
            format, truncated, or in need of another file that nobody allowed.
    """
    allowed = frozenset(os.path.realpath(name) for name in allow_backing)
    return _check(os.path.realpath(path), stated, allowed, above=())


def _check(
    path: str, stated: ImageFormat, allowed: frozenset[str], above: tuple[str, ...]
) -> Image:
    # A FIFO blocks whoever opens it, unless told not to.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BackendError(
            f"the image {path} cannot be opened: {error.strerror}; "
            "give the path of a file that this process may read",
            detail=str(error),
        ) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise BackendError(
                f"the image {path} is {kind}; give an image file, "
                "and attach a block device as a physical disk"
            )
        size, backing = _look_into(ImageFile(path, stated, fd, status.st_size))
    finally:
        os.close(fd)
    if backing is None:
        return Image(path, stated, size)
    return Image(path, stated, size, _check_backing(backing, allowed, (*above, path)))


def _look_into(file: ImageFile) -> Contents:
    match file.stated:
        case ImageFormat.QCOW2:
            return qcow2.check(file)
        case ImageFormat.VHD:
            return vhd.check(file)
        case ImageFormat.VHDX:
            return vhdx.check(file)
        case ImageFormat.RAW:
            if file.size < SECTOR:
                raise file.bad(f"its {file.size} bytes are less than one sector")
            return Contents(-(-file.size // SECTOR) * SECTOR)  # QEMU fills the last one up


def _check_backing(backing: Backing, allowed: frozenset[str], above: tuple[str, ...]) -> Image:
    path = above[-1]
    # QEMU takes a name with a colon before the first slash for a protocol, `json:` for instance.
    is_path = ":" not in backing.name.partition("/")[0]
    target = os.path.realpath(os.path.join(os.path.dirname(path), backing.name))
    if not is_path or target not in allowed:
        raise BackendError(
            f"the image {path} has the backing file {backing.name!r}, which is not allowed; "
            "flatten the image with qemu-img convert, or allow that file by name"
        )
    if target in above:
        raise BackendError(
            f"the image {path} has itself below it ({backing.name!r}); give an intact image"
        )
    if backing.format not in _BACKING_FORMATS:
        raise BackendError(
            f"the image {path} does not say which format its backing file {backing.name!r} has "
            f"({backing.format!r} is none we know); state it with qemu-img rebase -u -F"
        )
    return _check(target, _BACKING_FORMATS[backing.format], allowed, above)
