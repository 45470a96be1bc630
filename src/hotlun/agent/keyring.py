"""A key for the kernel, handed over by its keyring: there in no table, no file, no argument.

A key of type `logon` can be used by the kernel and not be read by anybody, root
included (keyrings(7)). The device mapper takes such a key by name, and copies it when
the table is loaded; so it is in the keyring for no longer than that.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

from hotlun.agent.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

_NUMBERS = {
    "x86_64": (248, 250),
    "aarch64": (217, 219),
    "riscv64": (217, 219),
    "loongarch64": (217, 219),
    "s390x": (278, 280),
    "armv7l": (309, 311),
    "i686": (286, 288),
}
"""add_key(2) and keyctl(2), which no library that every guest has knows."""

_THREAD_KEYRING = -1
_INVALIDATE = 21

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def random_key(size: int, name: str) -> Iterator[str]:
    """Have `size` random bytes in this thread's keyring; gives the key's name for the kernel.

    Args:
        name: tells it from other keys of this thread.

    Raises:
        RequestError: the kernel does not take it.
    """
    machine = os.uname().machine
    numbers = _NUMBERS.get(machine)
    if numbers is None:
        raise RequestError(f"no way to hand a key to the kernel of a {machine} is known")
    add_key, keyctl = map(ctypes.c_long, numbers)
    description = f"hotlun:{name}"
    secret = bytearray(size)
    try:
        os.getrandom(1)  # returns once the kernel has gathered what others cannot guess
        with open("/dev/urandom", "rb", buffering=0) as source:
            if source.readinto(secret) != size:
                raise RequestError("the kernel gave no random key")
        buffer = (ctypes.c_char * size).from_buffer(secret)
        serial = _libc.syscall(
            add_key,
            b"logon",
            os.fsencode(description),
            buffer,
            ctypes.c_size_t(size),
            ctypes.c_long(_THREAD_KEYRING),
        )
        if serial < 0:
            reason = os.strerror(ctypes.get_errno())
            raise RequestError(f"the kernel's keyring takes no key: {reason}")
    finally:
        secret[:] = bytes(size)
    try:
        yield description
    finally:
        _libc.syscall(keyctl, ctypes.c_long(_INVALIDATE), ctypes.c_long(serial))
