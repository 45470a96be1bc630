"""Encryption under the caller's key, which opens the volume again: LUKS2, by cryptsetup.

The key goes to cryptsetup's standard input, and nowhere else. Closing needs no program:
a mapped device is a mapped device.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hotlun.agent import filesystems, programs
from hotlun.agent.errors import RequestError, words
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from hotlun.agent.block_devices import BlockDevice
    from hotlun.agent.mappings import Layers, Mappings
    from hotlun.agent.settings import Key

TYPE = "crypto_LUKS"
"""libblkid's name for it."""

_ALONE = ("--batch-mode", "--disable-locks")
"""One request at a time has a disk; cryptsetup's own locks leave a directory in /run."""
_UNFINISHED = "hotlun: unfinished"
"""What a volume has for its subsystem until it is done. cryptsetup writes the header first,
and the key's slot seconds later; whatever happens between leaves what no key can open."""
_SUBSYSTEM = 208, 48
"""Where in the header that stands, and how long it can be (LUKS2 On-Disk Format, 1.1.2)."""

_FORMAT = (
    *("luksFormat", *_ALONE, "--type", "luks2", "--key-file", "-", "--subsystem", _UNFINISHED),
    *("--cipher", "aes-xts-plain64", "--key-size", "512", "--pbkdf", "argon2id"),
    # The cost of trying a key: fixed, as to measure takes seconds and gives an emulated or
    # busy guest a cost that nobody should rely on. RFC 9106's second choice is 3 and 64 MiB.
    *("--pbkdf-memory", "65536", "--pbkdf-force-iterations", "4", "--pbkdf-parallel", "1"),
)
_FINISH = ("config", *_ALONE, "--subsystem", "")
_OPEN = ("open", *_ALONE, "--type", "luks", "--key-file", "-")
_WRONG_KEY = 2
"""cryptsetup's exit status for "no permission (bad passphrase)", and for that alone."""

_NOISE = 1 << 20
"""Bytes of the start of a new volume that are written: unwritten ones read as anything."""


def open_volume(
    mappings: Mappings,
    layers: Layers,
    device: BlockDevice,
    key: Key,
    *,
    may_format: bool,
    read_only: bool,
) -> BlockDevice:
    """The device that gives what the LUKS volume on `device` holds; made where nothing is.

    Raises:
        RequestError: there is none, and none could be made, or may be; the key opens
            nothing of it (`HResult.WRONG_KEY`); or it is damaged.
    """
    is_new = not _is_there(device, may_format=may_format, read_only=read_only)
    if is_new:
        _cryptsetup(device, key, *_FORMAT, device.node)
    opened = _open(mappings, layers, device, key, read_only=read_only)
    if is_new:
        _write_start(opened)
        _cryptsetup(device, None, *_FINISH, device.node)
    return opened


def _is_there(device: BlockDevice, *, may_format: bool, read_only: bool) -> bool:
    """Whether a volume is on the device; if not, one is to be made.

    Raises:
        RequestError: none is, and none may be made.
    """
    found = filesystems.detect(device, (TYPE,))
    unfinished = found == TYPE and _is_unfinished(device)  # nothing was ever in it
    if found == TYPE and not unfinished:
        return True
    if found and not unfinished:
        raise RequestError(
            f"{device} holds {found} and no LUKS volume; a new one is made on a blank disk alone"
        )
    if not may_format:
        raise RequestError(
            f"{device} holds {'an unfinished' if unfinished else 'no'} LUKS volume; "
            "one is made if a filesystem is ensured"
        )
    if read_only:
        raise RequestError(f"{device} is read-only and blank: no LUKS volume can be made on it")
    return False


def _is_unfinished(device: BlockDevice) -> bool:
    start, length = _SUBSYSTEM
    try:
        with open(device.node, "rb", buffering=0) as file:
            header = file.read(start + length)
    except OSError as error:
        raise RequestError(f"{device} cannot be read: {words(error)}") from error
    return header[start:].rstrip(b"\0") == _UNFINISHED.encode()


def _write_start(opened: BlockDevice) -> None:
    """Have nothing be recognised in a volume that holds nothing."""
    try:
        with open(opened.node, "r+b", buffering=0) as file:
            length = min(_NOISE, file.seek(0, os.SEEK_END))
            os.pwrite(file.fileno(), bytes(length), 0)
            os.fsync(file.fileno())
    except OSError as error:
        raise RequestError(f"{opened} cannot be written: {words(error)}") from error


def _open(
    mappings: Mappings, layers: Layers, device: BlockDevice, key: Key, *, read_only: bool
) -> BlockDevice:
    flags = ["--readonly"] if read_only else []
    _cryptsetup(device, key, *_OPEN, *flags, device.node, layers.luks)
    mapped = mappings.mapper.find(layers.luks)
    if mapped is None:
        raise RequestError(f"{device}: cryptsetup opened it, and it is gone again")
    return mappings.device(device.slot, mapped)


def check_key(device: BlockDevice, key: Key) -> None:
    """Refuse a key that does not open the volume, which may be open already.

    Raises:
        RequestError: as for `open_volume`.
    """
    _cryptsetup(device, key, *_OPEN, "--test-passphrase", device.node)


def _cryptsetup(device: BlockDevice, key: Key | None, *arguments: str) -> None:
    program = programs.find("cryptsetup")
    if program is None:
        raise RequestError(f"{device} needs cryptsetup, and this guest has none")
    try:
        given = key.value if key is not None else b""
        programs.run(device, [program, *arguments], node=device.node, input=given)
    except programs.ProgramError as error:
        if error.status != _WRONG_KEY:
            raise
        raise RequestError(
            f"{device}: this key does not open its LUKS volume", HResult.WRONG_KEY
        ) from None
