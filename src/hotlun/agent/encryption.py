"""Encryption under a key that nobody keeps: what is written is gone with the mount.

Two mapped devices on top of each other. dm-integrity gives every 4096 bytes 32 more
for a tag, dm-crypt fills both: AES-XTS for the data, HMAC-SHA-256 over the data and
its place for the tag. What the host changes below, the guest cannot read any more (but
for an older state of the same block, under the same key, which nothing tells apart). The
kernel's options that would weaken this (`allow_discards`, `recalculate`) are not used,
and its journal is not either: after a crash there is no key to recover anything with.

A block that was never written has no valid tag, and fails when it is read. To write all
of them takes minutes for what may be thrown away in minutes; `unwritten` knows which a
filesystem needs.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from typing import TYPE_CHECKING

from hotlun.agent.devmapper import SECTOR, Table
from hotlun.agent.errors import RequestError, words
from hotlun.agent.keyring import random_key

if TYPE_CHECKING:
    from hotlun.agent.block_devices import BlockDevice
    from hotlun.agent.mappings import Layers, Mappings

BLOCK = 4096
_BLOCK_SECTORS = BLOCK // SECTOR
_TAG = 32
_CIPHER, _KEY_SIZE = "capi:authenc(hmac(sha256),xts(aes))-plain64", 32 + 64
"""A key for HMAC and two for XTS."""

_JOURNAL_SECTORS = 264
"""The smallest journal there is, one section; it is not used."""
_BEFORE = _BLOCK_SECTORS + _JOURNAL_SECTORS
_RUN, _RUN_TAGS = 32768, 32768 // _BLOCK_SECTORS * _TAG // SECTOR
"""Sectors of data that lie together, and the tags before them (dm-integrity's default)."""


def capacity(sectors: int) -> int:
    """Bytes that a device of so many sectors has when it is encrypted (Linux 6.1: dm-integrity.c).

    To tell beforehand, and for that alone: how many there are, the kernel says.
    """
    runs, rest = divmod(max(0, sectors - _BEFORE), _RUN + _RUN_TAGS)
    last = max(0, rest - _RUN_TAGS) // _BLOCK_SECTORS * _BLOCK_SECTORS
    return (runs * _RUN + last) * SECTOR


def open_new(mappings: Mappings, layers: Layers, device: BlockDevice) -> BlockDevice:
    """Encrypt a device under a new key. What was on it is lost; nothing can be read of it yet.

    Args:
        layers: the names of its mapped devices, of which none exists.

    Returns:
        the encrypted device.

    Raises:
        RequestError: it cannot be written, is in use, or the kernel refused; the caller
            closes what there is of the layers then.
    """
    mapper, slot = mappings.mapper, device.slot
    _erase_header(device)
    mapper.define(layers.integrity)
    mapper.load(layers.integrity, _integrity_table(device, _BLOCK_SECTORS))
    sectors = _provided_sectors(device)
    mapper.unload(layers.integrity)
    mapper.load(layers.integrity, _integrity_table(device, sectors))
    tagged = mappings.device(slot, mapper.resume(layers.integrity))
    with random_key(_KEY_SIZE, layers.crypt) as key:
        mapped = mapper.create(layers.crypt, _crypt_table(tagged, sectors, key))
    return mappings.device(slot, mapped)


def _integrity_table(device: BlockDevice, sectors: int) -> Table:
    return Table(
        sectors,
        "integrity",
        f"{device.number} 0 {_TAG} D 2 block_size:{BLOCK} journal_sectors:{_JOURNAL_SECTORS}",
    )


def _crypt_table(device: BlockDevice, sectors: int, key: str) -> Table:
    return Table(
        sectors,
        "crypt",
        f"{_CIPHER} :{_KEY_SIZE}:logon:{key} 0 {device.number} 0 "
        f"2 integrity:{_TAG}:aead sector_size:{BLOCK}",
    )


def _provided_sectors(device: BlockDevice) -> int:
    """What the header says that the kernel has written; past the page cache, as it did."""
    try:
        descriptor = os.open(device.node, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            with mmap.mmap(-1, BLOCK) as aligned:
                os.preadv(descriptor, [aligned], 0)
                magic, sectors = struct.unpack_from("<8s8xQ", aligned)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RequestError(f"{device}: its header cannot be read: {words(error)}") from error
    if magic != b"integrt\0" or sectors < _BLOCK_SECTORS:
        raise RequestError(f"{device}: the kernel wrote no header that it can be encrypted by")
    return int(sectors) // _BLOCK_SECTORS * _BLOCK_SECTORS


def _erase_header(device: BlockDevice) -> None:
    """Where there is no header the kernel writes a new one.

    Raises:
        RequestError: the device, or a part of it, is in use, or cannot be written.
    """
    try:
        descriptor = os.open(device.node, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, bytes(BLOCK), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        hint = ": it, or a part of it, is in use" if error.errno == errno.EBUSY else ""
        raise RequestError(f"{device} cannot be written: {words(error)}{hint}") from error
