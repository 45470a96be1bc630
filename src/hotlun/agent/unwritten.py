"""Filesystems on a device whose blocks cannot be read before they are written.

dm-integrity without its hour of wiping is such a device. A maker, a mount and a check
read more than they have written: the superblock's neighbours, the place of its copies,
bitmaps that are empty by definition. What that is for each filesystem is known here, and
written with zeros, some before the maker runs, the rest after it.

Seen with e2fsprogs 1.47, xfsprogs and btrfs-progs 6.1 and 6.2, and Linux 6.1; that fsck
passes and that each block of metadata can be read is what the tests hold.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from hotlun.agent import filesystems, programs
from hotlun.agent.errors import RequestError, words

if TYPE_CHECKING:
    from hotlun.agent.block_devices import BlockDevice

_KIB, _MIB = 1 << 10, 1 << 20
BLOCK = 4096

_START, _END = 512 * _KIB, 2 * _MIB
"""What libblkid reads of any device in search of nearly all that it knows."""

_EXT4_GROUP = 32768
"""Blocks a group: as many as a block has bits."""

_XFS_GROUPS = 4
_XFS_GROUP_HEAD = 128 * _KIB
"""What xfs_repair reads of each allocation group to find a superblock."""
_UNSUPPORTED = "--unsupported"
_XFS_GROUP_MAX = (1 << 40) - BLOCK

_ELSEWHERE = (512 * _KIB, 1 * _MIB, 2 * _MIB, 4 * _MIB)
"""Where else libblkid looks on any device: second headers of LUKS2, and VMFS."""

SMALLEST = {"ext4": _MIB, "xfs": 320 * _MIB, "btrfs": 109 * _MIB}
"""Bytes that a filesystem needs at least, where its maker says so only after it has written."""


def make(device: BlockDevice, filesystem: str) -> None:
    """Make a filesystem on an unwritten device, such that whatever will be read is written.

    Args:
        filesystem: one of `filesystems.MAKEABLE`.

    Raises:
        RequestError: it was not made.
    """
    try:
        with open(device.node, "r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            for offset, length in _zeros(filesystem, size):
                os.pwrite(file.fileno(), bytes(length), offset)
            os.fsync(file.fileno())
        _make(device, filesystem, _maker_arguments(filesystem, size))
        if filesystem == "ext4":
            _write_unused_bitmaps(device)
    except OSError as error:
        raise RequestError(f"{device} cannot be written: {words(error)}") from error


def _make(device: BlockDevice, filesystem: str, arguments: list[str]) -> None:
    try:
        filesystems.make(device, filesystem, arguments)
    except programs.ProgramError as error:
        # Before 5.19 mkfs.xfs knew no such word, and made small logs without it.
        if _UNSUPPORTED not in arguments or f"option '{_UNSUPPORTED}'" not in str(error):
            raise
        filesystems.make(device, filesystem, arguments[arguments.index(_UNSUPPORTED) + 1 :])


def _zeros(filesystem: str, size: int) -> list[tuple[int, int]]:
    """What to write before the maker runs: (offset, length) in bytes, within `size`."""
    ranges = [(0, _START), (max(0, size - _END), _END)]
    ranges += [(offset, BLOCK) for offset in _ELSEWHERE]
    if filesystem == "ext4":
        blocks = size // BLOCK
        ranges += [
            (group * _EXT4_GROUP * BLOCK, BLOCK) for group in _sparse_groups(blocks // _EXT4_GROUP)
        ]
    elif filesystem == "xfs":
        step = _xfs_group_size(size)
        ranges += [(offset, _XFS_GROUP_HEAD) for offset in range(step, size, step)]
    return [(start, min(length, size - start)) for start, length in ranges if start < size]


def _maker_arguments(filesystem: str, size: int) -> list[str]:
    """What the maker must be told: to leave nothing unwritten that will be read.

    And to write no more than that: a journal is there for what comes after a crash, and
    after a crash there is no key.
    """
    if filesystem == "ext4":
        # resize_inode would have blocks reserved, unwritten; the tables are read one day
        arguments = ["-b", str(BLOCK), "-O", "^resize_inode"]
        if size >= 128 * _MIB:
            # What is smaller has the smallest journal anyway, and one group. An inode for every
            # 16 KiB is what a disk from 512 MiB up gets. (With more, groups can be smaller.)
            arguments += ["-J", "size=8", "-i", "16384"]
        return [*arguments, "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"]
    if filesystem == "xfs":
        # "unsupported" is a log of less than 64 MiB, all of which is written
        return [_UNSUPPORTED, "-l", "size=16m", "-d", f"agsize={_xfs_group_size(size)}"]
    return []


def _write_unused_bitmaps(device: BlockDevice) -> None:
    """Write what an ext4 says is empty without having been written."""
    with open(device.node, "r+b", buffering=0) as file:
        for block in _unused_bitmaps(file.fileno()):
            os.pwrite(file.fileno(), bytes(BLOCK), block * BLOCK)
        os.fsync(file.fileno())


def _sparse_groups(last: int) -> list[int]:
    """The groups with a copy of the superblock (sparse_super): 1, and powers of 3, 5 and 7."""
    groups = {1} if last >= 1 else set()
    for base in (3, 5, 7):
        power = base
        while power <= last:
            groups.add(power)
            power *= base
    return sorted(groups)


def _xfs_group_size(size: int) -> int:
    """Bytes of an allocation group, such that there are as few as mkfs.xfs would make."""
    quarter = -(-size // _XFS_GROUPS)
    return min(-(-quarter // BLOCK) * BLOCK, _XFS_GROUP_MAX)


def _unused_bitmaps(descriptor: int) -> list[int]:
    """The blocks of the bitmaps that an ext4 says are empty without being written.

    Struct ext4_super_block and ext4_group_desc of fs/ext4/ext4.h.
    """
    superblock = os.pread(descriptor, 1024, 1024)
    (blocks,) = struct.unpack_from("<I", superblock, 0x4)
    (high,) = struct.unpack_from("<I", superblock, 0x150)
    (in_group,) = struct.unpack_from("<I", superblock, 0x20)
    (incompatible,) = struct.unpack_from("<I", superblock, 0x60)
    (size,) = struct.unpack_from("<H", superblock, 0xFE)
    is_64bit = bool(incompatible & 0x80)
    groups = -(-(blocks | (high << 32 if is_64bit else 0)) // in_group)
    size = size if is_64bit else 32
    found = []
    descriptors = os.pread(descriptor, groups * size, BLOCK)
    for start in range(0, groups * size, size):
        block_bitmap, inode_bitmap = struct.unpack_from("<II", descriptors, start)
        (flags,) = struct.unpack_from("<H", descriptors, start + 0x12)
        if size > 32:
            highs = struct.unpack_from("<II", descriptors, start + 0x20)
            block_bitmap, inode_bitmap = (
                block_bitmap | highs[0] << 32,
                inode_bitmap | highs[1] << 32,
            )
        if flags & 0x2:  # BLOCK_UNINIT
            found.append(block_bitmap)
        if flags & 0x1:  # INODE_UNINIT
            found.append(inode_bitmap)
    return found
