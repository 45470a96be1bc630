"""qcow2 (QEMU, docs/interop/qcow2.txt), big-endian."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from hotlun.containers.file import SECTOR, Backing, Contents

if TYPE_CHECKING:
    from hotlun.containers.file import ImageFile

_HEADER = struct.Struct(">4sIQIIQIIQQI12x")
_VERSION_3 = struct.Struct(">Q16xII")
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT = 0xE2792ACA
_DATA_FILE_NAME = 0x44415441
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_KNOWN_FEATURES = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED_L2
_COMPRESSED = 1 << 62
_CLUSTER_OFFSET = 0x00FF_FFFF_FFFF_FE00
_SCAN = 1 << 20
"""L2 entries looked through at most; 64 GiB of a disk with the usual clusters."""


def check(file: ImageFile) -> Contents:
    """Refuse what is not a whole qcow2, or keeps its data elsewhere; tell size and backing file.

    Raises:
        BackendError: the file cannot be used as a qcow2.
    """
    if file.size < 8 or file.read(0, 4) != b"QFI\xfb":
        raise file.bad("the signature is missing")
    (
        _,
        version,
        backing_offset,
        backing_length,
        cluster_bits,
        size,
        encryption,
        l1_entries,
        l1_offset,
        refcounts_offset,
        refcounts_clusters,
    ) = _HEADER.unpack(file.read(0, _HEADER.size))
    if version not in (2, 3):
        raise file.bad(f"its version is {version}")
    if not 9 <= cluster_bits <= 21:
        raise file.bad(f"clusters of 2^{cluster_bits} bytes do not exist")
    features, refcount_order, header_length = 0, 4, _HEADER.size
    if version == 3:
        features, refcount_order, header_length = _VERSION_3.unpack(
            file.read(_HEADER.size, _VERSION_3.size)
        )
    if encryption:
        raise file.bad("it is encrypted, and there is nobody to give the key")
    if features & ~_KNOWN_FEATURES or refcount_order > 6:
        raise file.bad("it needs features that are not known")
    if features & _CORRUPT:
        raise file.bad("it is marked as corrupt; repair it with qemu-img check -r all")
    cluster = 1 << cluster_bits
    head = file.read(0, min(cluster, file.size))
    extensions = _extensions(file, head, header_length)
    if features & _DATA_FILE or _DATA_FILE_NAME in extensions:
        raise file.bad("it keeps its data in another file, which is refused")
    l2_entry = 16 if features & _EXTENDED_L2 else 8
    if l1_entries < -(-size // (cluster * (cluster // l2_entry))):
        raise file.bad("its tables are too small for its size")
    file.require(l1_offset, l1_entries * 8)
    highest = _highest_cluster(file, refcounts_offset, refcounts_clusters, cluster, refcount_order)
    if highest * cluster >= file.size:
        _check_tables(file, l1_offset, l1_entries, cluster_bits, l2_entry)
    size -= size % SECTOR  # QEMU (7.2) drops what is no whole sector
    if not backing_offset:
        return Contents(size)
    if backing_length > 1023 or backing_offset + backing_length > len(head):
        raise file.bad("the name of its backing file is out of place")
    backing = Backing(
        os.fsdecode(head[backing_offset : backing_offset + backing_length]),
        extensions.get(_BACKING_FORMAT, b"").decode("ascii", "replace"),
    )
    return Contents(size, backing)


def _extensions(file: ImageFile, head: bytes, offset: int) -> dict[int, bytes]:
    extensions: dict[int, bytes] = {}
    while offset + _EXTENSION.size <= len(head):
        kind, length = _EXTENSION.unpack_from(head, offset)
        if not kind:
            break
        offset += _EXTENSION.size
        if offset + length > len(head):
            raise file.bad("a header extension is out of place")
        extensions[kind] = head[offset : offset + length]
        offset += -(-length // 8) * 8
    return extensions


def _highest_cluster(
    file: ImageFile, table_offset: int, table_clusters: int, cluster: int, order: int
) -> int:
    """The number of the last cluster with a reference count."""
    table = file.read(table_offset, table_clusters * cluster).rstrip(b"\0")
    if not table:
        raise file.bad("it counts no references")
    last = (len(table) - 1) // 8
    (block_offset,) = struct.unpack(">Q", table[last * 8 :].ljust(8, b"\0"))
    block = file.read(block_offset, cluster).rstrip(b"\0")
    clusters_per_block = cluster * 8 >> order
    return int(last * clusters_per_block + (max(len(block) - 1, 0) * 8 >> order))


def _check_tables(
    file: ImageFile, l1_offset: int, l1_entries: int, cluster_bits: int, l2_entry: int
) -> None:
    """A cluster counted beyond the end: is it really in use, or left by a writer that died?"""
    cluster = 1 << cluster_bits
    compressed_offset = (1 << 62 - (cluster_bits - 8)) - 1
    seen = 0
    for l1_entry in file.table("Q", "big", l1_offset, l1_entries):
        l2_offset = l1_entry & _CLUSTER_OFFSET
        if not l2_offset:
            continue
        if (seen := seen + cluster // l2_entry) > _SCAN:
            break
        for entry in file.table("Q", "big", l2_offset, cluster // 8)[:: l2_entry // 8]:
            mask = compressed_offset if entry & _COMPRESSED else _CLUSTER_OFFSET
            if entry & mask >= file.size:
                raise file.truncated()
