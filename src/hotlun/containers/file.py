"""An open image file, and how a container's check says what is wrong with it."""

from __future__ import annotations

import array
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from hotlun.errors import BackendError

if TYPE_CHECKING:
    from hotlun.model import ImageFormat

SECTOR = 512
_LARGEST_TABLE = 32 << 20
"""Bytes; QEMU's own limit for a qcow2's L1 table, and more than any other table needs."""


class Backing(NamedTuple):
    """What an image says about the one below it, both as written there."""

    name: str
    format: str


class Contents(NamedTuple):
    """What a container's metadata says.

    Args:
        size: of the disk in it as QEMU shows it to a guest, in bytes; None where that
            is more than the metadata can tell.
        backing: the image that it needs below itself, if it needs one.
    """

    size: int | None
    backing: Backing | None = None


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image opened for reading. Offsets and lengths may come from the image itself.

    Args:
        path: where it is, for messages.
        stated: the format that it is said to have, for messages.
        fd: open for reading; whoever opened it closes it.
        size: in bytes.
    """

    path: str
    stated: ImageFormat
    fd: int
    size: int

    def require(self, offset: int, length: int) -> None:
        """Make sure that these bytes are there.

        Raises:
            BackendError: they reach beyond the end of the file.
        """
        if offset + length > self.size:
            raise self.truncated()

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes.

        Raises:
            BackendError: they reach beyond the end of the file, or are absurdly many.
        """
        if length > _LARGEST_TABLE:
            raise self.bad(f"a table of {length} bytes is not to be believed")
        self.require(offset, length)
        data = os.pread(self.fd, length, offset)
        if len(data) < length:
            raise self.truncated()
        return data

    def table(
        self, typecode: Literal["I", "Q"], byteorder: str, offset: int, count: int
    ) -> array.array[int]:
        """`count` integers of 4 (`"I"`) or 8 (`"Q"`) bytes."""
        entries: array.array[int] = array.array(typecode)
        entries.frombytes(self.read(offset, count * entries.itemsize))
        if byteorder != sys.byteorder:
            entries.byteswap()
        return entries

    def bad(self, why: str) -> BackendError:
        """The error that refuses this image."""
        return BackendError(
            f"the image {self.path} is not a usable {self.stated} image: {why}; "
            "state the format it really has, or give an intact image"
        )

    def truncated(self) -> BackendError:
        """The error for tables that speak of more than there is."""
        return self.bad("it is truncated, its tables point beyond the end of the file")
