"""A device mapper that keeps its devices in a dictionary, for the agent's tests."""

from __future__ import annotations

import errno
import os
import struct

HEADER = 312
LIST, CREATE, REMOVE, SUSPEND, STATUS, LOAD, CLEAR, TABLE = 2, 3, 4, 6, 7, 9, 10, 12
READ_ONLY, BUFFER_FULL, DEFERRED = 1 << 0, 1 << 8, 1 << 17


class FakeMapper:
    """The kernel's side: what dm-ioctl.h says, for one target a device."""

    def __init__(self) -> None:
        self.devices: dict[str, list[str]] = {}
        """By name: the table in service, and the one loaded, as `start length target words`."""
        self.busy: set[str] = set()
        self.refused: set[int] = set()
        self.flags: dict[int, int] = {}

    def __call__(self, request: int, buffer: bytearray) -> None:
        assert request & 0xFFFFFF00 == 3 << 30 | HEADER << 16 | 0xFD << 8
        command = request & 0xFF
        major, _, _, size, start, count = struct.unpack_from("=6I", buffer)
        assert (major, size, start) == (4, len(buffer), HEADER)
        (flags,) = struct.unpack_from("=I", buffer, 28)
        name = bytes(buffer[48:176]).partition(b"\0")[0].decode()
        self.flags[command] = flags
        if command in self.refused:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if command == LIST:
            self._list(buffer)
            return
        if command == CREATE:
            if name in self.devices:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            self.devices[name] = ["", ""]
        elif name not in self.devices:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        elif command == LOAD:
            assert count == 1
            self.devices[name][1] = self._table(buffer)
        elif command == CLEAR:
            self.devices[name][1] = ""
        elif command == SUSPEND:
            self.devices[name][:] = [self.devices[name][1], ""]
        elif command == TABLE:
            words = self.devices[name][0].split(" ", 3)[3].encode()
            buffer[HEADER + 40 : HEADER + 40 + len(words)] = words
        elif command == REMOVE:
            if name in self.busy and not flags & DEFERRED:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            if name not in self.busy:
                del self.devices[name]
                return
        struct.pack_into("=Q", buffer, 40, 253 << 8 | list(self.devices).index(name))

    def _list(self, buffer: bytearray) -> None:
        listed = b""
        for number, name in enumerate(self.devices):
            entry = name.encode() + b"\0"
            entry += bytes(-(12 + len(entry)) % 8)
            following = 12 + len(entry) if number + 1 < len(self.devices) else 0
            listed += struct.pack("=QI", 253 << 8 | number, following) + entry
        if HEADER + len(listed) > len(buffer):
            struct.pack_into("=I", buffer, 28, BUFFER_FULL)
        else:
            buffer[HEADER : HEADER + len(listed)] = listed

    @staticmethod
    def _table(buffer: bytearray) -> str:
        start, length, _, following, kind = struct.unpack_from("=QQiI16s", buffer, HEADER)
        text = bytes(buffer[HEADER + 40 : HEADER + following])
        assert following % 8 == 0
        assert text.endswith(b"\0")
        target = kind.partition(b"\0")[0].decode()
        return f"{start} {length} {target} {text.partition(bytes(1))[0].decode()}"
