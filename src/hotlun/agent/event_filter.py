"""Has the kernel keep the events to itself that nobody here waits for.

It announces a disk in eight events and its end in seven, and only one of each is the block
device's. To be woken for the others, to throw them away, cost a third of the guest's processor
time while disks were plugged in (`benchmarks/probe.py`). So the socket has a filter (socket(7),
SO_ATTACH_FILTER), which is run before anybody is woken.
"""

from __future__ import annotations

import ctypes
import socket
import struct

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h; Python has no name for it

_LOAD_WORD = 0x20  # linux/bpf_common.h: BPF_LD | BPF_W | BPF_ABS, big-endian
_JUMP_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_ALL = 0xFFFFFFFF

_SOUGHT = b"/block/"
_WORD = 4
_WINDOWS = [_SOUGHT[at : at + _WORD] for at in range(_WORD)]
"""One of these lies where a word begins, wherever the whole does: a load for every fourth byte.

Loads are dear: a socket's filter has 20 KiB (net.core.optmem_max until Linux 6.7), in the form
that the kernel translates it to, and that is enough for some two hundred.
"""
_FIRST = len("add@/devices")
_END = 396
"""An event that is longer, and has had no such word until here, is let through."""


def only_block_devices(events: socket.socket) -> None:
    """Have the socket receive no uevents but those of block devices, and hardly any other.

    Raises:
        OSError: this kernel takes no such filter.
    """
    # Filters cannot loop. A load from behind the event's end ends the filter, and drops the event.
    let_through = _instruction(_RETURN, _ALL)
    look = b"".join(
        _instruction(_JUMP_IF_EQUAL, int.from_bytes(window, "big"), jump=left, otherwise=not left)
        for left, window in zip(reversed(range(_WORD)), _WINDOWS)
    )
    offsets = range(_FIRST, _END, _WORD)
    steps = b"".join(_instruction(_LOAD_WORD, offset) + look + let_through for offset in offsets)
    code = steps + let_through
    program = ctypes.create_string_buffer(code)
    # struct sock_fprog, which the kernel reads during the call only
    described = struct.pack("HP", len(code) // len(let_through), ctypes.addressof(program))
    events.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)


def _instruction(code: int, operand: int, *, jump: int = 0, otherwise: int = 0) -> bytes:
    """A struct sock_filter; jumps are over so many instructions."""
    return struct.pack("HBBI", code, jump, otherwise, operand)
