"""Encryption under the caller's key, which opens the volume again: LUKS2, by cryptsetup.

The key goes to cryptsetup's standard input, and nowhere else. Closing needs no program:
a mapped device is a mapped device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotlun.agent import filesystems, programs
from hotlun.agent.errors import RequestError
from hotlun.bridge.messages import HResult

if TYPE_CHECKING:
    from hotlun.agent.mappings import Layers, Mappings
    from hotlun.agent.scsi import BlockDevice
    from hotlun.agent.settings import Key

TYPE = "crypto_LUKS"
"""libblkid's name for it."""

_ALONE = ("--batch-mode", "--disable-locks")
"""One request at a time has a disk; cryptsetup's own locks leave a directory in /run."""
_FORMAT = (
    *("luksFormat", *_ALONE, "--type", "luks2", "--key-file", "-"),
    *("--cipher", "aes-xts-plain64", "--key-size", "512", "--pbkdf", "argon2id"),
    # The cost of trying a key: fixed, as to measure takes seconds and gives an emulated or
    # busy guest a cost that nobody should rely on. RFC 9106's second choice is 3 and 64 MiB.
    *("--pbkdf-memory", "65536", "--pbkdf-force-iterations", "4", "--pbkdf-parallel", "1"),
)
_OPEN = ("open", *_ALONE, "--type", "luks", "--key-file", "-")
_WRONG_KEY = 2
"""cryptsetup's exit status for "no permission (bad passphrase)", and for that alone."""


def ensure(device: BlockDevice, key: Key, *, may_format: bool, read_only: bool) -> None:
    """See that a LUKS volume is on the device, and make one where nothing is.

    Raises:
        RequestError: there is none, and none could be made, or may be.
    """
    found = filesystems.detect(device, (TYPE,))
    if found == TYPE:
        return
    if found or not may_format:
        advice = (
            "a new one is made on a blank disk alone"
            if found
            else "one is made if a filesystem is ensured"
        )
        raise RequestError(
            f"{device} holds {found or 'nothing that is known'} and no LUKS volume; {advice}"
        )
    if read_only:
        raise RequestError(f"{device} is read-only and blank: no LUKS volume can be made on it")
    _cryptsetup(device, key, *_FORMAT, device.node)


def open_existing(
    mappings: Mappings, layers: Layers, device: BlockDevice, key: Key, *, read_only: bool
) -> BlockDevice:
    """The device that gives what the LUKS volume on `device` holds.

    Raises:
        RequestError: the key opens nothing of it (`HResult.WRONG_KEY`), or it is damaged.
    """
    flags = ["--readonly"] if read_only else []
    _cryptsetup(device, key, *_OPEN, *flags, device.node, layers.luks)
    mapped = mappings.mapper.find(layers.luks)
    if mapped is None:
        raise RequestError(f"{device}: cryptsetup opened it, and it is gone again")
    return mappings.device(device.slot, mapped)


def check_key(device: BlockDevice, key: Key) -> None:
    """Refuse a key that does not open the volume, which may be open already.

    Raises:
        RequestError: as for `open_existing`.
    """
    _cryptsetup(device, key, *_OPEN, "--test-passphrase", device.node)


def _cryptsetup(device: BlockDevice, key: Key, *arguments: str) -> None:
    program = programs.find("cryptsetup")
    if program is None:
        raise RequestError(f"{device} needs cryptsetup, and this guest has none")
    try:
        programs.run(device, [program, *arguments], node=device.node, input=key.value)
    except programs.ProgramError as error:
        if error.status != _WRONG_KEY:
            raise
        raise RequestError(
            f"{device}: this key does not open its LUKS volume", HResult.WRONG_KEY
        ) from None
