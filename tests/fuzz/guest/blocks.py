"""What is on the guest's disks: few bytes in much nothing, as far as the agent looks at them."""

from __future__ import annotations

import errno
import struct

from fuzz.grammar import ROOT_HASH
from fuzz.guest.tree import failure

_PAGE = 4096


class Blocks:
    """The bytes of a block device, and who it is.

    Args:
        number: the device's, as `8:1`.
        size: bytes.
        whole: the number of the disk that it is a part of; its own if it is none.
    """

    def __init__(self, number: str, size: int, whole: str = "") -> None:
        self.number = number
        self.size = size
        self.whole = whole or number
        self.read_only = False
        self.broken = False
        """Every read and write is an error."""
        self.key = b""
        """Of the LUKS volume on it."""
        self.root_hash = ""
        self._pages: dict[int, bytes] = {}

    def copy(self) -> Blocks:
        """Another with the same."""
        other = Blocks(self.number, self.size, self.whole)
        other.__dict__.update(self.__dict__)
        other._pages = dict(self._pages)
        return other

    def read(self, offset: int, length: int) -> bytes:
        """What there is of it.

        Raises:
            OSError: it cannot be read.
        """
        if self.broken:
            raise failure(errno.EIO)
        length = max(0, min(length, self.size - offset))
        if not length:
            return b""
        content = bytearray(length)
        for number, page in self._pages.items():
            start = number * _PAGE - offset
            if -_PAGE < start < length:
                part = page[max(0, -start) : length - start]
                content[max(0, start) : max(0, start) + len(part)] = part
        return bytes(content)

    def write(self, offset: int, data: bytes) -> int:
        """Put it there.

        Raises:
            OSError: it cannot be written.
        """
        if self.broken:
            raise failure(errno.EIO)
        if self.read_only:
            raise failure(errno.EPERM)
        data = data[: max(0, self.size - offset)]
        if not data:
            raise failure(errno.ENOSPC)
        for number in range(offset // _PAGE, (offset + len(data) - 1) // _PAGE + 1):
            start = number * _PAGE - offset
            part = data[max(0, start) : start + _PAGE]
            if not part.strip(b"\0") and len(part) == _PAGE:
                self._pages.pop(number, None)
                continue
            page = bytearray(self._pages.get(number, bytes(_PAGE)))
            page[max(0, -start) : max(0, -start) + len(part)] = part
            self._pages[number] = bytes(page)
        return len(data)

    def fill(self, what: str) -> None:
        """Have it hold a filesystem, or whatever `what` calls."""
        self._pages = {}
        for offset, content in _CONTENTS[what]:
            self.write(offset, content)
        if what == "verity":
            self.root_hash = ROOT_HASH

    @property
    def filesystem(self) -> str:
        """What the kernel could mount it as."""
        if self.broken:
            return ""
        for name, offset, magic in (
            ("xfs", 0, b"XFSB"),
            ("btrfs", 0x10040, b"_BHRfS_M"),
            ("squashfs", 0, b"hsqs"),
            ("ext4", 0x438, b"\x53\xef"),
            ("crypto_LUKS", 0, b"LUKS\xba\xbe"),
        ):
            if self.read(offset, len(magic)) == magic:
                return name
        return ""


def _ext4(blocks: int) -> bytes:
    """A superblock with what is read of it: struct ext4_super_block."""
    superblock = bytearray(1024)
    for form, offset, value in (
        ("<I", 0x4, blocks),
        ("<I", 0x18, 2),
        ("<I", 0x20, 32768),
        ("<H", 0x38, 0xEF53),
        ("<I", 0x5C, 0x4),
        ("<I", 0x60, 0x40 | 0x2 | 0x80),
        ("<H", 0xFE, 64),
    ):
        struct.pack_into(form, superblock, offset, value)
    return bytes(superblock)


_VERITY = struct.pack(
    "<8sII16s32sIIQH6x256s",
    *(b"verity\0\0", 1, 1, bytes(16), b"sha256", 4096, 4096, 16, 32, b"salt" * 8),
)

_CONTENTS: dict[str, tuple[tuple[int, bytes], ...]] = {
    "": (),
    "ext4": ((0x400, _ext4(64)),),
    "xfs": ((0, b"XFSB" + bytes(60)),),
    "half xfs": ((0, b"XFSB".ljust(0x7E, b"\0") + b"\1"),),
    "btrfs": ((0x10040, b"_BHRfS_M"),),
    "squashfs": ((0, b"hsqs" + bytes(36) + struct.pack("<Q", 65536)),),
    "verity": ((0x400, _ext4(16)), (65536, _VERITY)),
    "crypto_LUKS": ((0, b"LUKS\xba\xbe"),),
    "half LUKS": ((0, b"LUKS\xba\xbe"), (208, b"hotlun: unfinished")),
    "two": ((0, b"XFSB"), (0x400, _ext4(64))),
    "gpt": (
        (0x1B0, bytes(14) + b"\0\0\0\0\xee".ljust(64, b"\0") + b"\x55\xaa"),
        (512, b"EFI PART"),
    ),
    "lvm": ((0x218, b"LVM2 001"),),
}
