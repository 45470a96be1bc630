"""A disk as a block node: the arguments of `blockdev-add`, everything stated.

Nothing is left for QEMU to find out or to follow: the format, the backing chain,
read-only all the way down, locking.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from hotlun.backends.providers import provider_node
from hotlun.containers.file import SECTOR
from hotlun.errors import BackendError, UnsupportedError
from hotlun.images import Image, check_image
from hotlun.model import DiskKind, ImageFormat

if TYPE_CHECKING:
    from collections.abc import Collection

    from hotlun.model import Disk

Node = dict[str, object]


class DiskNode(NamedTuple):
    """A disk as QEMU is told of it.

    Args:
        arguments: those of `blockdev-add`.
        size: in bytes, as the guest is going to see it; None if that is not certain.
    """

    arguments: Node
    size: int | None


_DRIVERS = {
    ImageFormat.RAW: "raw",
    ImageFormat.QCOW2: "qcow2",
    ImageFormat.VHD: "vpc",
    ImageFormat.VHDX: "vhdx",
}


def driver_of(disk: Disk) -> str:
    """QEMU's name for how the disk's bytes are read; `""` if nobody has said."""
    if disk.kind is DiskKind.VIRTUAL_DISK:
        return _DRIVERS[disk.format] if disk.format else ""
    return "raw"


def block_node(
    disk: Disk, name: str, *, allow_backing: Collection[str] = (), is_open: bool = False
) -> DiskNode:
    """The node `name` that holds the disk.

    Args:
        disk: the disk.
        name: the node's.
        allow_backing: files that an image may have below it.
        is_open: QEMU has it open already, with no image below: it is not looked at again, and
            need not be within reach of this process.

    Raises:
        BackendError: it cannot be such a disk.
        UnsupportedError: nobody provides this extensible virtual disk.
    """
    _sayable(disk.path)
    if disk.kind is DiskKind.VIRTUAL_DISK:
        if disk.format is None:
            raise BackendError(
                "the format of the image is not stated and never guessed; give format= "
                f"({', '.join(ImageFormat)}), or a name that ends in .raw, .img, .qcow2, "
                ".vhd, .vpc or .vhdx"
            )
        if is_open:
            image = Image(os.path.realpath(disk.path), disk.format, None)
        else:
            image = check_image(disk.path, disk.format, allow_backing=allow_backing)
        node, size = _image_node(image, read_only=disk.read_only), image.size
    else:
        if disk.format not in (None, ImageFormat.RAW):
            raise BackendError(
                f"only an image file has a format, this is no {disk.format} image; leave it out"
            )
        if disk.kind is DiskKind.PHYSICAL_DISK:
            protocol = _host_device(disk.path)
            size = None if is_open else _checked_size(disk.path)
        else:
            protocol, size = provider_node(disk, is_open=is_open), None
        node = _node("raw", protocol, read_only=disk.read_only)
    return DiskNode({"node-name": name, **node}, size)


def needed_files(disk: Disk, *, allow_backing: Collection[str] = ()) -> dict[str, bool]:
    """The files that QEMU opens for a disk: path -> whether it writes there.

    Raises:
        BackendError: the disk is a qcow2 image with a backing file that is not allowed.
        UnsupportedError: an extensible virtual disk is not opened as a file.
    """
    if disk.kind is DiskKind.EXTENSIBLE_VIRTUAL_DISK:
        raise UnsupportedError(
            "its provider has the files of an extensible virtual disk; give access there"
        )
    files = {os.path.realpath(disk.path): not disk.read_only}
    if allow_backing and disk.format is ImageFormat.QCOW2:
        image = check_image(disk.path, disk.format, allow_backing=allow_backing)
        files.update(dict.fromkeys(image.below, False))
    return files


def _sayable(path: str) -> str:
    """The path, if it is UTF-8: QEMU's monitor hangs up on one that it is told of and is not."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise BackendError(
            "its path is not UTF-8, and QEMU's monitor takes no other; rename it"
        ) from error
    return path


def _image_node(image: Image, *, read_only: bool) -> Node:
    # A symbolic link may have led anywhere.
    file: Node = {"driver": "file", "filename": _sayable(image.path), "locking": "on"}
    node = _node(_DRIVERS[image.format], file, read_only=read_only)
    if image.format is ImageFormat.QCOW2:
        below = image.backing
        # Without this member QEMU opens whatever the image names, /etc/passwd for instance.
        node["backing"] = _image_node(below, read_only=True) if below else None
    return node


def _host_device(path: str) -> Node:
    return {"driver": "host_device", "filename": _sayable(os.path.realpath(path)), "locking": "on"}


def _checked_size(path: str) -> int | None:
    """A block device's size in bytes, if it is known.

    Raises:
        BackendError: it is no block device.
    """
    path = os.path.realpath(path)
    try:
        status = os.stat(path)
    except OSError as error:
        raise BackendError(
            f"the physical disk {path} cannot be found: {error.strerror}; "
            "give the path of a block device",
            detail=str(error),
        ) from error
    if not stat.S_ISBLK(status.st_mode):
        raise BackendError(
            f"{path} is not a block device; give one, or attach an image as a virtual disk"
        )
    return _device_size(status.st_rdev)


def _device_size(number: int) -> int | None:
    """From sysfs, for which the device need not be opened: QEMU's user may, this process not."""
    folder = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    try:
        with open(f"{folder}/size", encoding="ascii") as file:
            return int(file.read()) * SECTOR
    except (OSError, ValueError):
        return None


def _node(driver: str, protocol: Node, *, read_only: bool) -> Node:
    access: Node = {"read-only": read_only, "auto-read-only": False, "discard": "unmap"}
    return {"driver": driver, **access, "file": {**protocol, **access}}
