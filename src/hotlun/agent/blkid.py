"""libblkid, by which mount(8) and udev know what is on a device, called through ctypes.

It is asked for every signature rather than for its verdict (`blkid_do_safeprobe`)
alone: that stops at the first container, and so calls an ext4 or xfs a LUKS volume
where mkfs has left the second header of an older LUKS2 further on.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from typing import NamedTuple

_LIBRARY = "libblkid.so.1"

# blkid.h, the same in every version since 2.24
_SUPERBLOCK_TYPE = 1 << 5
_BAD_CHECKSUMS_TOO = 1 << 10
_AMBIVALENT = -2
_NOTHING_MORE = 1

_ENOUGH = 64
"""Signatures after which to stop: no device has so many."""


class Content(NamedTuple):
    """What is on a device.

    Args:
        names: of all that seems to be there, as libblkid calls it, the likeliest first.
        ambivalent: there is more than one, and nothing says which of them is alive.
    """

    names: tuple[str, ...] = ()
    ambivalent: bool = False


def probe(device: int) -> Content | None:
    """What libblkid finds on an open device; None if this guest has no libblkid.

    Raises:
        OSError: it could not read what it looks at. It passes over some such errors,
            so "nothing" is to be believed only of a device that can be read.
    """
    library = _library()
    if library is None:
        return None
    handle = library.blkid_new_probe()
    if not handle:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    ctypes.set_errno(0)
    try:
        _check(library.blkid_probe_set_device(handle, device, 0, 0))
        library.blkid_probe_enable_superblocks(handle, 1)
        library.blkid_probe_set_superblocks_flags(handle, _SUPERBLOCK_TYPE | _BAD_CHECKSUMS_TOO)
        library.blkid_probe_enable_partitions(handle, 1)
        verdict = library.blkid_do_safeprobe(handle)
        if verdict == _NOTHING_MORE:
            return Content()
        ambivalent = verdict == _AMBIVALENT
        names = []
        if not ambivalent:
            _check(verdict)
            names += _names(library, handle)
        library.blkid_reset_probe(handle)
        for _ in range(_ENOUGH):
            if _check(library.blkid_do_probe(handle)) == _NOTHING_MORE:
                break
            names += _names(library, handle)
        return Content(tuple(dict.fromkeys(names)), ambivalent)
    finally:
        library.blkid_free_probe(handle)


def _names(library: ctypes.CDLL, handle: int) -> list[str]:
    """The superblock's and the partition table's, of the last result."""
    found = []
    for kind in (b"TYPE", b"PTTYPE"):
        value, size = ctypes.c_char_p(), ctypes.c_size_t()
        if not library.blkid_probe_lookup_value(
            handle, kind, ctypes.byref(value), ctypes.byref(size)
        ):
            found.append((value.value or b"").decode("ascii", "replace"))
    return found


def _check(result: int) -> int:
    """Pass a result on.

    Raises:
        OSError: it is an error's: a negated errno, or -1 and, for some, errno.
    """
    if result >= 0:
        return result
    number = -result if result < -1 else ctypes.get_errno() or errno.EIO
    raise OSError(number, os.strerror(number))


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Loaded when first needed, as many an agent never looks at a disk that is not named.

    Each probe has a handle of its own, so that threads do not meet.
    """
    try:
        library = ctypes.CDLL(_LIBRARY, use_errno=True)
        handle, number = ctypes.c_void_p, ctypes.c_int
        library.blkid_new_probe.argtypes = ()
        library.blkid_new_probe.restype = handle
        library.blkid_free_probe.argtypes = (handle,)
        library.blkid_free_probe.restype = None
        # blkid_loff_t is 64 bits everywhere
        offset = ctypes.c_int64
        library.blkid_probe_set_device.argtypes = (handle, number, offset, offset)
        for name in (
            "blkid_probe_enable_superblocks",
            "blkid_probe_set_superblocks_flags",
            "blkid_probe_enable_partitions",
        ):
            getattr(library, name).argtypes = (handle, number)
        for name in ("blkid_reset_probe", "blkid_do_probe", "blkid_do_safeprobe"):
            getattr(library, name).argtypes = (handle,)
        library.blkid_reset_probe.restype = None
        library.blkid_probe_lookup_value.argtypes = (
            handle,
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_char_p),
            ctypes.POINTER(ctypes.c_size_t),
        )
    except (OSError, AttributeError):
        return None
    return library
