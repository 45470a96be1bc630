"""VHDX ([MS-VHDX]), little-endian."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING
from uuid import UUID

from hotlun.containers.file import SECTOR, Contents

if TYPE_CHECKING:
    from hotlun.containers.file import ImageFile

_KIB = 1 << 10
_HEADERS = (64 * _KIB, 128 * _KIB)
_REGIONS = 192 * _KIB
_HEADER = struct.Struct("<4s4xQ32x16s")
_MOST_ENTRIES = 2047
_PRESENT = (6, 7)
_SCAN = 1 << 16
"""Block table entries looked through at most; 2 TiB of a disk with blocks of 32 MiB."""
_BAT = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le
_METADATA = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
_FILE_PARAMETERS = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
_VIRTUAL_SIZE = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8").bytes_le
_SECTOR_SIZE = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f").bytes_le
_PARENT_LOCATOR = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
_IS_FIXED, _HAS_PARENT = 1, 2


def check(file: ImageFile) -> Contents:
    """Refuse what is not a whole VHDX that stands on its own; tell its size.

    Raises:
        BackendError: the file cannot be used as a VHDX.
    """
    if file.size < 8 or file.read(0, 8) != b"vhdxfile":
        raise file.bad("the signature is missing")
    headers = [_HEADER.unpack(file.read(offset, _HEADER.size)) for offset in _HEADERS]
    valid = [header for header in headers if header[0] == b"head"]
    if not valid:
        raise file.bad("both its headers are missing")
    _, _, log = max(valid, key=lambda header: int(header[1]))
    regions = _entries(file, b"regi", _REGIONS, "<8xI4x", "<16sQI4x")
    if not {_BAT, _METADATA} <= regions.keys():
        raise file.bad("its regions are incomplete")
    metadata, _ = regions[_METADATA]
    items = _entries(file, b"metadata", metadata, "<10xH20x", "<16sII8x")
    if not {_FILE_PARAMETERS, _VIRTUAL_SIZE, _SECTOR_SIZE} <= items.keys():
        raise file.bad("its metadata is incomplete")
    block, flags = struct.unpack("<II", file.read(metadata + items[_FILE_PARAMETERS][0], 8))
    (size,) = struct.unpack("<Q", file.read(metadata + items[_VIRTUAL_SIZE][0], 8))
    (sector,) = struct.unpack("<I", file.read(metadata + items[_SECTOR_SIZE][0], 4))
    if flags & _HAS_PARENT or _PARENT_LOCATOR in items:
        raise file.bad("it is a differencing disk, and needs a parent, which is refused")
    if block < _KIB * _KIB or sector not in (512, 4096):
        raise file.bad(f"blocks of {block} and sectors of {sector} bytes do not exist")
    blocks = -(-size // block)
    # After every so many blocks the table has one entry for their sector bitmap.
    count = blocks + max(blocks - 1, 0) // max((sector << 23) // block, 1)
    offset, length = regions[_BAT]
    if count * 8 > length:
        raise file.bad("its block table is too small for its size")
    file.require(offset, length)
    if flags & _IS_FIXED:
        file.require(0, size)
    # QEMU (7.2) drops what is no whole sector, and opens none with sectors of 4096 bytes.
    contents = Contents(size - size % SECTOR if sector == SECTOR else None)
    # What a log has yet to replay is not in the block table.
    if any(log) or count > _SCAN:
        return contents
    for entry in file.table("Q", "little", offset, count):
        if entry & 7 in _PRESENT and (entry >> 20 << 20) + block > file.size:
            raise file.truncated()
    return contents


def _entries(
    file: ImageFile, signature: bytes, offset: int, header: str, entry: str
) -> dict[bytes, tuple[int, int]]:
    """A table of regions or of metadata: id -> (offset, length)."""
    start = file.read(offset, struct.calcsize(header))
    if not start.startswith(signature):
        raise file.bad(f"its {signature.decode()} table is missing")
    (count,) = struct.unpack(header, start)
    if count > _MOST_ENTRIES:
        raise file.bad(f"a {signature.decode()} table of {count} entries is not to be believed")
    table = file.read(offset + len(start), count * struct.calcsize(entry))
    return {name: (at, length) for name, at, length in struct.iter_unpack(entry, table)}
