"""Which disk a device is: the serial and the size that the kernel read when it found it.

What the kernel keeps from then is what gives a stale device away. Ask the device
itself (INQUIRY), and the disk that has taken the place of the old one answers.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from hotlun.agent.kernel import check_absent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotlun.agent.kernel import Kernel

_SERIAL_NUMBER, _IDENTIFICATION = 0x80, 0x83
"""The pages of vital product data (SPC-4, 7.8) that have a serial in them."""

_HEADER = 4
_LONGEST = 4096
"""Bytes of a page that the kernel shows: its own pages are not smaller (kernfs)."""

_LOGICAL_UNIT, _VENDOR_SPECIFIC, _ASCII = 0, 0, 2
"""Association, type and code set of the designator that QEMU makes of a serial."""

_SECTOR = 512
"""What `size` in sysfs counts, whatever the disk's own sectors are."""


class Identity(NamedTuple):
    """What a disk is known by; asked for, or found.

    Args:
        serial: `""` if that is not asked, or not known.
        size: bytes of the whole disk; None if that is not asked, or not known.
    """

    serial: str = ""
    size: int | None = None

    @classmethod
    def read(cls, kernel: Kernel, device: str, disk: str) -> Identity:
        """As the kernel has it.

        Args:
            device: the SCSI device's directory in sysfs.
            disk: the directory of its block device.

        Raises:
            OSError: as `check_absent`.
        """
        known = serial(device)
        try:
            return cls(known, int(kernel.attribute(f"{disk}/size")) * _SECTOR)
        except OSError as error:
            check_absent(error)
            return cls(known)

    def has_serial_of(self, wanted: Identity) -> bool:
        """Whether the serial is the one that is wanted, if one is."""
        return not wanted.serial or self.serial == wanted.serial

    def is_proof_of(self, wanted: Identity) -> bool:
        """Whether all that is wanted is known and so."""
        return self.has_serial_of(wanted) and wanted.size in (None, self.size)

    def against(self, wanted: Identity) -> str:
        """What differs, in words: `its serial is 'a', not 'b'`."""
        parts = []
        if not self.has_serial_of(wanted):
            own = repr(self.serial) if self.serial else "not known to this guest's kernel"
            parts.append(f"its serial is {own}, not {wanted.serial!r}")
        if wanted.size not in (None, self.size):
            size = f"{self.size:,} bytes" if self.size is not None else "not known"
            parts.append(f"its size is {size}, not {wanted.size:,}")
        return " and ".join(parts)


def serial(device: str) -> str:
    """The serial of a SCSI device; `""` if it is not known.

    Args:
        device: its directory in sysfs.

    Raises:
        OSError: as `check_absent`.
    """
    return serial_number(_page(device, "vpd_pg80")) or designated_serial(_page(device, "vpd_pg83"))


def serial_number(page: bytes) -> str:
    """The serial in a page 0x80; `""` if there is none that can be believed."""
    return _text(_body(page, _SERIAL_NUMBER))


def designated_serial(page: bytes) -> str:
    """The serial in a page 0x83, where QEMU has it once more; `""` as `serial_number`."""
    for kind, designator in _designators(_body(page, _IDENTIFICATION)):
        if kind == (_LOGICAL_UNIT, _VENDOR_SPECIFIC, _ASCII):
            return _text(designator)
    return ""


def _page(device: str, name: str) -> bytes:
    """A binary attribute; nothing if the device is gone or has no such page."""
    try:
        file = os.open(f"{device}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(file, _LONGEST)
        finally:
            os.close(file)
    except OSError as error:
        check_absent(error)
        return b""


def _body(page: bytes, code: int) -> bytes:
    """What follows the header, if it is that page and all of it is there."""
    if len(page) < _HEADER or page[1] != code:
        return b""
    length = int.from_bytes(page[2:_HEADER], "big")
    body = page[_HEADER : _HEADER + length]
    return body if len(body) == length else b""


def _designators(body: bytes) -> Iterator[tuple[tuple[int, int, int], bytes]]:
    """Association, type and code set of each, and its content, up to one that is cut off."""
    while len(body) >= _HEADER:
        end = _HEADER + body[3]
        if end > len(body):
            return
        yield (body[1] >> 4 & 3, body[1] & 0xF, body[0] & 0xF), body[_HEADER:end]
        body = body[end:]


def _text(content: bytes) -> str:
    """Printable ASCII, without the spaces and NULs that it is padded with."""
    try:
        text = content.decode("ascii").strip(" \0")
    except UnicodeDecodeError:
        return ""
    return text if text.isprintable() else ""
