"""What is on a block device: libblkid's word, and the magic numbers of what may be there.

The magic numbers are all there is in a guest without libblkid. Where it is, they are
the second opinion, as a wrong guess here can cost data: they also tell of what is
damaged, or was never finished, and a device is blank only if both say so. A read
error is an error, never an empty device. The names are libblkid's.
"""

from __future__ import annotations

import os
import struct

from hotlun.agent import blkid
from hotlun.agent.blkid import Content

_HEAD = 0x11000
"""How much of the start is read: all magic numbers below lie in it."""
_TAIL = 0x20000
_READ_TO_BE_SURE = 1 << 20

EXT_FAMILY = ("ext2", "ext3", "ext4")

FILESYSTEMS = frozenset(
    (
        *EXT_FAMILY,
        *("xfs", "btrfs", "f2fs", "erofs", "squashfs", "iso9660", "udf", "vfat", "exfat"),
        *("ntfs", "jfs", "reiserfs", "nilfs2", "gfs2", "ocfs2", "cramfs", "romfs", "hfsplus"),
        *("bcachefs", "minix", "hfs", "ufs", "affs", "befs", "bfs", "qnx4", "zonefs"),
    )
)
"""Of the names that are given here, those that can be mounted."""

PARTITION_TABLES = ("gpt", "dos", "PMBR")
_TOLERANT = ("iso9660", "udf")
"""What may be there beside others: a disc has both, for old readers and new ones."""

_PAGES = (0x1000, 0x2000, 0x4000, 0x8000, 0x10000)

_MAGIC = (
    # Containers first: what is inside them is not to be seen, what lies outside is old.
    ("crypto_LUKS", 0, b"LUKS\xba\xbe"),
    *(("crypto_LUKS", 0x4000 << power, b"SKUL\xba\xbe") for power in range(3)),
    ("BitLocker", 3, b"-FVE-FS-"),
    ("linux_raid_member", 0, b"\xfc\x4e\x2b\xa9"),
    ("linux_raid_member", 0x1000, b"\xfc\x4e\x2b\xa9"),
    ("LVM2_member", 0x18, b"LVM2 001"),
    ("LVM2_member", 0x218, b"LVM2 001"),
    ("LVM2_member", 0x418, b"LVM2 001"),
    ("LVM2_member", 0x618, b"LVM2 001"),
    ("bcache", 0x1018, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")),
    ("bcachefs", 0x1018, bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef")),
    ("ceph_bluestore", 0, b"bluestore block device"),
    ("DM_verity_hash", 0, b"verity\0\0"),
    ("DM_integrity", 0, b"integrt\0"),
    ("apfs", 0x20, b"NXSB"),
    # A bootable CD image has a partition table too; what else a table's disk holds is old.
    ("iso9660", 0x8001, b"CD001"),
    ("udf", 0x8001, b"BEA01"),
    ("gpt", 0x200, b"EFI PART"),
    ("gpt", 0x1000, b"EFI PART"),
    ("xfs", 0, b"XFSB"),
    ("btrfs", 0x10040, b"_BHRfS_M"),
    # mkfs.btrfs: gives it the magic number when all else is written
    ("unfinished btrfs", 0x10040, b"!BHRfS_M"),
    ("f2fs", 0x400, b"\x10\x20\xf5\xf2"),
    ("erofs", 0x400, b"\xe2\xe1\xf5\xe0"),
    ("squashfs", 0, b"hsqs"),
    ("cramfs", 0, b"\x45\x3d\xcd\x28"),
    ("romfs", 0, b"-rom1fs-"),
    ("jfs", 0x8000, b"JFS1"),
    ("reiserfs", 0x10034, b"ReIsErFs"),
    ("reiserfs", 0x10034, b"ReIsEr2Fs"),
    ("reiserfs", 0x10034, b"ReIsEr3Fs"),
    ("gfs2", 0x10000, b"\x01\x16\x19\x70"),
    ("ocfs2", 0x2000, b"OCFSV2"),
    ("ocfs2", 0x1000, b"OCFSV2"),
    ("hfsplus", 0x400, b"H+\0\4"),
    ("hfsplus", 0x400, b"HX\0\5"),
    ("nilfs2", 0x400, b"\2\0\0\0\0\0\x34\x34"),
    ("ntfs", 3, b"NTFS    "),
    ("exfat", 3, b"EXFAT   "),
    ("vfat", 82, b"FAT32   "),
    ("vfat", 54, b"FAT16   "),
    ("vfat", 54, b"FAT12   "),
    *(("swap", page - 10, b"SWAPSPACE2") for page in _PAGES),
    *(("swsuspend", page - 10, b"S1SUSPEND") for page in _PAGES),
)

_XFS_IN_PROGRESS = 0x7E
"""sb_inprogress: the last that mkfs.xfs clears, when all else is written."""

_EXT_MAGIC = b"\x53\xef"
# fs/ext4/ext4.h: what ext2 and ext3 may have; whoever has more is ext4
_HAS_JOURNAL = 0x4
_JOURNAL_DEVICE = 0x8
_EXT2_INCOMPATIBLE = 0x2 | 0x10
_EXT3_INCOMPATIBLE = _EXT2_INCOMPATIBLE | 0x4
_EXT3_READ_ONLY = 0x1 | 0x2 | 0x4


def look(path: str) -> Content:
    """What the device holds; nothing only if nothing is known here and all of it was read.

    Raises:
        OSError: it cannot be read.
    """
    device = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        size = os.lseek(device, 0, os.SEEK_END)
        start = max(0, size - _TAIL)
        ours = identify(_read(device, 0, _HEAD), _read(device, start, size - start), size)
        theirs = blkid.probe(device) or Content()
        # libblkid takes an xfs that is not done for one that is, and a boot loader in front
        # of a filesystem for a partition table, though without partitions.
        wrong = {"dos"} if ours.names and "dos" not in ours.names else set()
        known = [
            name
            for name in theirs.names
            if name not in wrong and unfinished(name) not in ours.names
        ]
        if not known and not ours.names:
            # libblkid passes over errors of a CD drive or a locked range. What is to be
            # called blank must be there to be read, where it looks and where an mkfs writes.
            _read(device, 0, _READ_TO_BE_SURE)
        ambivalent = theirs.ambivalent if known else ours.ambivalent
        return Content(tuple(dict.fromkeys((*known, *ours.names))), ambivalent)
    finally:
        os.close(device)


def detect(path: str, wanted: tuple[str, ...] = ()) -> str:
    """The name that counts of what the device holds, `""` if nothing that is known here.

    Args:
        wanted: the names that come first where there is more than one. An mkfs may
            leave older marks: mkfs.ext4 1.47 without `resize_inode` the second header of
            a LUKS2, which lies in its inode tables then.

    Raises:
        OSError: it cannot be read.
    """
    names = look(path).names
    return next((name for name in names if name in wanted), names[0] if names else "")


def unfinished(name: str) -> str:
    """What a filesystem is called whose making was interrupted."""
    return f"unfinished {name}"


def identify(head: bytes, tail: bytes = b"", size: int = 0) -> Content:
    """What the magic numbers in a device's first and last bytes say.

    Args:
        tail: what ends at `size`, the device's size in bytes.
    """
    found = [name for name, offset, magic in _MAGIC if head.startswith(magic, offset)]
    if "xfs" in found and head[_XFS_IN_PROGRESS : _XFS_IN_PROGRESS + 1] != b"\0":
        found[found.index("xfs")] = unfinished("xfs")
    found += filter(None, (_ext(head[0x400:]), _dos_partitions(head), _end(tail, size)))
    names = tuple(dict.fromkeys(found))
    rivals = [name for name in names if name not in PARTITION_TABLES + _TOLERANT]
    return Content(names, len(rivals) > 1 and rivals[0] in FILESYSTEMS)


def _read(device: int, offset: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.pread(device, size, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


def _ext(superblock: bytes) -> str:
    if len(superblock) < 0x400 or superblock[0x38:0x3A] != _EXT_MAGIC:
        return ""
    compatible, incompatible, read_only = struct.unpack_from("<III", superblock, 0x5C)
    if incompatible & _JOURNAL_DEVICE:
        return "jbd"
    if incompatible & ~_EXT3_INCOMPATIBLE or read_only & ~_EXT3_READ_ONLY:
        return "ext4"
    return "ext3" if compatible & _HAS_JOURNAL else "ext2"


def _dos_partitions(head: bytes) -> str:
    """A partition table: the mark of a boot sector, and entries that are none or sound."""
    if head[510:512] != b"\x55\xaa":
        return ""
    entries = [head[offset : offset + 16] for offset in range(446, 510, 16)]
    used = [entry for entry in entries if entry[4]]
    if used and all(entry[0] in (0, 0x80) for entry in entries):
        return "PMBR" if any(entry[4] == 0xEE for entry in used) else "dos"
    return ""


def _end(tail: bytes, size: int) -> str:
    """What leaves its mark at the end: RAID with metadata 0.90 or 1.0, a GPT's second copy."""
    start = size - len(tail)
    for offset in ((size & ~0xFFFF) - 0x10000, (size & ~0xFFF) - 0x2000):
        if offset >= start and tail.startswith(b"\xfc\x4e\x2b\xa9", offset - start):
            return "linux_raid_member"
    for sector in (512, 4096):
        if len(tail) >= sector and tail.startswith(b"EFI PART", len(tail) - sector):
            return "gpt"
    return ""
