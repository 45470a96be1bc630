"""Disk images of every kind that the agent must recognise, made by the real tools.

What the tools for would be heavy to install (LVM, md RAID, ISO 9660) is written here as
their formats say, checksums included.
"""

from __future__ import annotations

import struct
import subprocess
import zlib
from typing import TYPE_CHECKING

from support.guest import image_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_MKFS_EXT4 = ("mkfs.ext4", "-F", "-q")
_LUKS = ("cryptsetup", "luksFormat", "-q", "--key-file", "/dev/zero", "--keyfile-size", "16")
_FAST = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")

_TOOLS = {
    "blank": ("", 16, ()),
    "ext2": ("ext2", 16, ("mkfs.ext2", "-F", "-q")),
    "ext3": ("ext3", 16, ("mkfs.ext3", "-F", "-q")),
    "ext4": ("ext4", 16, _MKFS_EXT4),
    "ext4 without a journal": ("ext4", 16, (*_MKFS_EXT4, "-O", "^has_journal")),
    "ext4 with blocks of 64 KiB": ("ext4", 64, (*_MKFS_EXT4, "-b", "65536")),
    "a journal of its own": ("jbd", 16, (*_MKFS_EXT4, "-O", "journal_dev")),
    "xfs": ("xfs", 320, ("mkfs.xfs", "-f", "-q")),
    "xfs of version 4": ("xfs", 320, ("mkfs.xfs", "-f", "-q", "-m", "crc=0")),
    "btrfs": ("btrfs", 128, ("mkfs.btrfs", "-f", "-q")),
    "vfat of 12 bits": ("vfat", 4, ("mkfs.vfat", "-F", "12")),
    "vfat of 16 bits": ("vfat", 16, ("mkfs.vfat", "-F", "16")),
    "vfat of 32 bits": ("vfat", 64, ("mkfs.vfat", "-F", "32")),
    "swap": ("swap", 16, ("mkswap", "-q")),
    "swap of big pages": ("swap", 16, ("mkswap", "-q", "--pagesize", "16384")),
    "LUKS 1": ("crypto_LUKS", 32, (*_LUKS, "--type", "luks1", *_FAST[2:])),
    "LUKS 2": ("crypto_LUKS", 32, (*_LUKS, "--type", "luks2", *_FAST)),
}


def tree(path: Path) -> str:
    """A directory with one file."""
    source = path.with_suffix(".tree")
    source.mkdir()
    (source / "file").write_text("content")
    return str(source)


def erofs(path: Path) -> None:
    command = ["mkfs.erofs", "--quiet", str(path), tree(path)]
    subprocess.run(command, check=True, capture_output=True)


def squashfs(path: Path) -> None:
    command = ["mksquashfs", tree(path), str(path), "-quiet", "-processors", "1"]
    subprocess.run(command, check=True, capture_output=True)


def partitioned(path: Path, label: str) -> None:
    """A disk with one partition."""
    image_of(path, 16)
    subprocess.run(
        ["sfdisk", "--quiet", str(path)],
        input=f"label: {label}\n,,\n",
        text=True,
        check=True,
        capture_output=True,
    )


def verity(path: Path) -> None:
    """The hashes of a device, with their header."""
    data = image_of(path.with_suffix(".data"), 1)
    subprocess.run(["veritysetup", "format", str(data), str(path)], check=True, capture_output=True)


def write(path: Path, offset: int, content: bytes) -> None:
    """Have `content` at an offset, from the end if it is negative; 16 MiB if it is new."""
    if not path.exists():
        image_of(path, 16)
    with path.open("r+b") as file:
        file.seek(offset, 2 if offset < 0 else 0)
        file.write(content)


def iso9660(path: Path) -> None:
    """A primary volume descriptor, and the one that ends their list."""
    primary = b"\x01CD001\x01\0" + b"LINUX".ljust(32) + b"HOTLUN".ljust(32)
    write(path, 0x8000, primary.ljust(2048, b"\0") + b"\xffCD001\x01".ljust(2048, b"\0"))


def lvm(path: Path) -> None:
    """A physical volume's label, in the second sector."""
    after = struct.pack("<I8s32s", 32, b"LVM2 001", b"a" * 32).ljust(512 - 20, b"\0")
    checksum = zlib.crc32(after, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    write(path, 512, struct.pack("<8sQI", b"LABELONE", 1, checksum) + after)


def raid(path: Path, offset: int) -> None:
    """A member of a RAID with metadata 1.x, which lie at an offset (the end's: negative)."""
    sector = (offset if offset >= 0 else (16 << 20) + offset) // 512
    block = bytearray(256)
    struct.pack_into("<III", block, 0, 0xA92B4EFC, 1, 0)
    struct.pack_into("<QQQ", block, 128, 2048, 8192, sector)
    total = sum(struct.unpack("<64I", block))
    struct.pack_into("<I", block, 216, (total & 0xFFFFFFFF) + (total >> 32))
    write(path, offset, bytes(block))


def old_raid(path: Path) -> None:
    """A member of a RAID with metadata 0.90, 64 KiB before the end."""
    words = (0xA92B4EFC, 0, 90, 0, 0, 1, 0, 1, 4096, 2, 2)
    write(path, -0x10000, struct.pack(f"<{len(words)}I", *words).ljust(4096, b"\0"))


IMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "erofs": ("erofs", erofs),
    "squashfs": ("squashfs", squashfs),
    "iso9660": ("iso9660", iso9660),
    "LVM": ("LVM2_member", lvm),
    "RAID 0.90": ("linux_raid_member", old_raid),
    "RAID 1.0": ("linux_raid_member", lambda path: raid(path, -0x2000)),
    "RAID 1.1": ("linux_raid_member", lambda path: raid(path, 0)),
    "RAID 1.2": ("linux_raid_member", lambda path: raid(path, 0x1000)),
    "GPT": ("gpt", lambda path: partitioned(path, "gpt")),
    "MBR": ("dos", lambda path: partitioned(path, "dos")),
    "verity": ("DM_verity_hash", verity),
}
"""By a name for people: what libblkid calls it, and what makes the file."""


def _add(name: str, kind: str, mebibytes: int, command: tuple[str, ...]) -> None:
    IMAGES[name] = (kind, lambda path: image_of(path, mebibytes, *command))


for _name, _entry in _TOOLS.items():
    _add(_name, *_entry)
