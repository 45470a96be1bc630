"""VHD ("Virtual Hard Disk Image Format Specification" 1.0), big-endian."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from hotlun.containers.file import SECTOR, Contents

if TYPE_CHECKING:
    from hotlun.containers.file import ImageFile

_FOOTER = struct.Struct(">8s8xQ24xQ4xI")
_HEADER = struct.Struct(">8s8xQ4xII")
_FIXED, _DYNAMIC, _DIFFERENCING = 2, 3, 4
_UNUSED = 0xFFFFFFFF


def check(file: ImageFile) -> Contents:
    """Refuse what is not a whole fixed or dynamic VHD.

    A fixed one has its footer behind the data; the others have a copy in front, too.
    The size is not told: whether it is the footer's or that of its cylinders, heads and
    sectors depends for QEMU on which program made the image.

    Raises:
        BackendError: the file cannot be used as a VHD.
    """
    if file.size < 2 * SECTOR:
        raise file.bad("it is too short for a footer")
    tail = _FOOTER.unpack(file.read(file.size - SECTOR, _FOOTER.size))
    head = _FOOTER.unpack(file.read(0, _FOOTER.size))
    has_tail, has_head = tail[0] == b"conectix", head[0] == b"conectix"
    if not has_tail and not has_head:
        raise file.bad("it has no VHD footer, so it is truncated or of another format")
    _, header_offset, size, kind = head if has_head else tail
    if has_tail and tail[3] == _FIXED:
        # The first sector of a fixed disk is the guest's, yet QEMU 7.2 believes a footer there.
        if has_head:
            raise file.bad("it is fixed, but its first sector poses as a dynamic one's")
        if size + SECTOR > file.size:
            raise file.truncated()
        return Contents(size=None)
    if kind == _DIFFERENCING:
        raise file.bad("it is a differencing disk, and needs a parent, which is refused")
    if not has_head or kind != _DYNAMIC:
        raise file.bad("its footer says neither a fixed nor a dynamic disk")
    _check_dynamic(file, header_offset, is_whole=has_tail)
    return Contents(size=None)


def _check_dynamic(file: ImageFile, header_offset: int, *, is_whole: bool) -> None:
    cookie, table_offset, count, block = _HEADER.unpack(file.read(header_offset, _HEADER.size))
    if cookie != b"cxsparse" or block < SECTOR:
        raise file.bad("the header of a dynamic disk is missing")
    if is_whole:
        file.require(table_offset, count * 4)
        return
    # The footer goes behind the last block; a writer that died may have overwritten it.
    table = file.table("I", "big", table_offset, count)
    bitmap = -(-block // (SECTOR * 8 * SECTOR)) * SECTOR
    last = max((entry for entry in table if entry != _UNUSED), default=0)
    if last * SECTOR + bitmap + block > file.size:
        raise file.truncated()
