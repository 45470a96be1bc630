"""Read-only disks that prove each block that is read: dm-verity, under a root hash.

The caller's root hash is all that is trusted. The tree of hashes and the header that
says how it is built (veritysetup's, `struct verity_sb`) lie on the disk, right behind
the filesystem as hcsshim's `dmverity-vhd` puts them, or where the caller says. What a
host has changed of them, or of the data, is an I/O error when it is read.
"""

from __future__ import annotations

import os
import re
import struct
from typing import TYPE_CHECKING, NamedTuple

from hotlun.agent.devmapper import SECTOR, Table
from hotlun.agent.errors import RequestError, words

if TYPE_CHECKING:
    from hotlun.agent.block_devices import BlockDevice
    from hotlun.agent.mappings import Layers, Mappings
    from hotlun.agent.settings import Verity

_HEADER = struct.Struct("<8sII16s32sIIQH6x256s")
"""Signature, version, hash type, uuid, algorithm, block sizes, data blocks, salt's size, salt."""
_SIGNATURE = b"verity\0\0"
_ALGORITHM = rb"[a-z0-9][a-z0-9-]*"
_TABLE_WORDS = 10
_HEAD = 2048
"""Bytes from the start that tell how long a filesystem is."""


class _Header(NamedTuple):
    hash_type: int
    algorithm: str
    data_block: int
    hash_block: int
    data_blocks: int
    salt: str


def open_verified(
    mappings: Mappings, layers: Layers, device: BlockDevice, verity: Verity
) -> BlockDevice:
    """The device that gives what `device` holds, verified, as far as the tree reaches.

    Raises:
        RequestError: there is no tree, it does not fit the root hash, or the kernel
            refused it; the caller closes what there is of the layers then.
    """
    offset = verity.hash_offset or _filesystem_size(device)
    header = _header(device, offset)
    if header.data_blocks * header.data_block > offset:
        raise RequestError(
            f"{device}: its verity header at {offset} claims more data than lies before it"
        )
    sectors = header.data_blocks * header.data_block // SECTOR
    words_of_table = (
        f"{header.hash_type} {device.number} {device.number} {header.data_block} "
        f"{header.hash_block} {header.data_blocks} {_tree(offset, header.hash_block)} "
        f"{header.algorithm} {verity.root_hash} {header.salt or '-'}"
    )
    table = Table(sectors, "verity", words_of_table, read_only=True)
    verified = mappings.device(device.slot, mappings.mapper.create(layers.verity, table))
    _check_root(verified)
    if not verity.hash_offset and _filesystem_size(verified) != offset:
        # Until here the filesystem's size, and so the place of the tree, was the disk's claim.
        raise RequestError(f"{device}: its verity tree belongs to a filesystem of another size")
    return verified


def is_open(mappings: Mappings, layers: Layers, device: BlockDevice, verity: Verity) -> bool:
    """Whether there is such a device over this one, under this root hash."""
    told = mappings.mapper.table(layers.verity).split()
    if len(told) < _TABLE_WORDS or told[1:3] != [device.number] * 2 or told[8] != verity.root_hash:
        return False
    return not verity.hash_offset or int(told[6]) == _tree(verity.hash_offset, int(told[4]))


def _tree(offset: int, block: int) -> int:
    """The first block of the tree, which begins behind the header."""
    return -(-(offset + SECTOR) // block)


def _check_root(verified: BlockDevice) -> None:
    """Read something, for only then the kernel compares."""
    try:
        _read(verified, 0, SECTOR)
    except OSError as error:
        raise RequestError(
            f"disk {verified.slot} does not fit the root hash: its first block, or the tree above "
            f"it, is not what it was ({words(error)})"
        ) from error


def _header(device: BlockDevice, offset: int) -> _Header:
    try:
        data = _read(device, offset, _HEADER.size)
    except OSError as error:
        raise RequestError(f"{device} cannot be read at {offset}: {words(error)}") from error
    if len(data) < _HEADER.size or not data.startswith(_SIGNATURE):
        raise RequestError(f"{device} has no verity header at {offset}; say where its tree lies")
    _, version, kind, _, name, data_block, hash_block, blocks, size, salt = _HEADER.unpack(data)
    algorithm = name.rstrip(b"\0")
    known = (
        version == 1
        and kind in (0, 1)
        and re.fullmatch(_ALGORITHM, algorithm)
        and all(_is_block_size(block) for block in (data_block, hash_block))
        and 0 < blocks < 1 << 48
        and size <= len(salt)
    )
    if not known:
        raise RequestError(f"{device}: its verity header at {offset} makes no sense")
    return _Header(kind, algorithm.decode(), data_block, hash_block, blocks, salt[:size].hex())


def _is_block_size(size: int) -> bool:
    return SECTOR <= size <= 1 << 19 and not size & (size - 1)


def _filesystem_size(device: BlockDevice) -> int:
    """Where the filesystem ends, as its superblock says.

    Raises:
        RequestError: it cannot be read, or is none whose size is known here.
    """
    try:
        head = _read(device, 0, _HEAD)
    except OSError as error:
        raise RequestError(f"{device} cannot be read: {words(error)}") from error
    size = 0
    if len(head) == _HEAD:
        size = _ext_size(head[1024:]) or _erofs_size(head[1024:]) or _squashfs_size(head)
    if not 0 < size < 1 << 62 or size % SECTOR:
        raise RequestError(
            f"{device} holds no filesystem whose end is known here: say where its verity tree lies"
        )
    return size


def _ext_size(superblock: bytes) -> int:
    """fs/ext4/ext4.h: struct ext4_super_block."""
    if superblock[0x38:0x3A] != b"\x53\xef":
        return 0
    low, log_block, high = (
        struct.unpack_from("<I", superblock, at)[0] for at in (0x4, 0x18, 0x150)
    )
    is_64bit = struct.unpack_from("<I", superblock, 0x60)[0] & 0x80
    return (low | (high << 32 if is_64bit else 0)) << (10 + log_block) if log_block <= 6 else 0


def _erofs_size(superblock: bytes) -> int:
    """fs/erofs/erofs_fs.h: struct erofs_super_block."""
    if superblock[:4] != b"\xe2\xe1\xf5\xe0" or not 9 <= superblock[12] <= 16:
        return 0
    return int(struct.unpack_from("<I", superblock, 36)[0]) << superblock[12]


def _squashfs_size(head: bytes) -> int:
    """fs/squashfs/squashfs_fs.h: struct squashfs_super_block; mksquashfs fills up to 4 KiB."""
    if head[:4] != b"hsqs":
        return 0
    return -(-int(struct.unpack_from("<Q", head, 40)[0]) // 4096) * 4096


def _read(device: BlockDevice, offset: int, size: int) -> bytes:
    descriptor = os.open(device.node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
