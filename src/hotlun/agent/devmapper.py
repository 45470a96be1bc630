"""Mapped devices: made, found and removed by the device mapper's ioctls.

No program is run for it: a fork and an exec cost an emulated guest a hundred times
what the ioctl does, and a table that is loaded from here is in nobody's argument list.
The interface is that of include/uapi/linux/dm-ioctl.h, version 4.0.

A mapping is known by its name, which tells the slot, the partition and the layer. So
whoever comes next, an agent that was started anew included, finds it and can close it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
from typing import TYPE_CHECKING, NamedTuple

from hotlun.agent import programs
from hotlun.agent.errors import RequestError, words
from hotlun.agent.kernel import check_absent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hotlun.agent.kernel import Kernel

_HEADER = struct.Struct("=3IIIIiIIIQ128s129s7x")
"""struct dm_ioctl: version, sizes, target count, open count, flags, event, device, name, uuid."""
_TARGET = struct.Struct("=QQiI16s")
"""struct dm_target_spec: start and length in sectors, status, offset of the next, type."""
_NAME = struct.Struct("=QI")
"""The head of struct dm_name_list: a device's number, and the offset of the next one's."""
_BUFFER = 4096

_LIST, _CREATE, _REMOVE, _SUSPEND, _STATUS, _LOAD, _CLEAR, _TABLE = 2, 3, 4, 6, 7, 9, 10, 12
_READ_ONLY, _AS_TABLE, _BUFFER_FULL, _DEFERRED = 1 << 0, 1 << 4, 1 << 8, 1 << 17

_IN_MISC = " device-mapper"
"""In /proc/misc, if the kernel has it."""

SECTOR = 512


class Table(NamedTuple):
    """What a mapped device consists of: one target over all of it."""

    sectors: int
    target: str
    words: str
    read_only: bool = False


class DeviceMapper:
    """The kernel's device mapper. Safe for many threads, as the kernel's is.

    Args:
        ioctl: does what fcntl.ioctl does on the control device, which is opened when it
            is first needed.
    """

    def __init__(
        self, kernel: Kernel, ioctl: Callable[[int, bytearray], object] | None = None
    ) -> None:
        self._kernel = kernel
        self._ioctl = ioctl or self._control
        self._lock = threading.Lock()
        self._descriptor = -1

    def find(self, name: str) -> str | None:
        """The number of the mapped device of this name, as `253:0`; None if there is none.

        Raises:
            RequestError: the kernel cannot be asked.
        """
        if self._absent():
            return None
        try:
            return _number(self._call(_STATUS, name))
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise self._failed("looked for", name, error) from error

    def names(self, stem: str) -> list[str]:
        """Of the mapped devices whose names begin so: one question in place of many.

        Raises:
            RequestError: the kernel cannot be asked.
        """
        if self._absent():
            return []
        size = _BUFFER
        while True:
            answer = self._checked("looked for", _LIST, "", room=size)
            if not _HEADER.unpack_from(answer)[7] & _BUFFER_FULL:
                break
            size *= 4
        return [name for name in _listed(answer) if name.startswith(stem)]

    def table(self, name: str) -> str:
        """The words of the table in service, none if there is no such device.

        Raises:
            RequestError: the kernel cannot be asked.
        """
        if self.find(name) is None:
            return ""
        answer = self._checked("looked at", _TABLE, name, _AS_TABLE)
        start = _HEADER.size + _TARGET.size
        return answer[start:].partition(b"\0")[0].decode("utf-8", "replace")

    def create(self, name: str, table: Table) -> str:
        """Make a mapped device and put it into service; its number. If that fails there is none.

        Raises:
            RequestError: the kernel refused it.
        """
        self.define(name)
        try:
            self.load(name, table)
            return self.resume(name)
        except RequestError:
            with contextlib.suppress(RequestError):  # the one that led here matters more
                self.remove(name, deferred=True)
            raise

    def define(self, name: str) -> None:
        """Make a mapped device that has no table yet. Raises as `create` does."""
        self._checked("made", _CREATE, name)

    def load(self, name: str, table: Table) -> None:
        """Give a device its next table; `resume` puts it into service. Raises as `create` does."""
        text = os.fsencode(table.words) + b"\0"
        text += bytes(-len(text) % 8)
        target = _TARGET.pack(
            0, table.sectors, 0, _TARGET.size + len(text), os.fsencode(table.target)
        )
        flags = _READ_ONLY if table.read_only else 0
        self._checked(f"loaded ({table.target})", _LOAD, name, flags, target + text)

    def unload(self, name: str) -> None:
        """Take back a table that was not put into service. Raises as `create` does."""
        self._checked("unloaded", _CLEAR, name)

    def resume(self, name: str) -> str:
        """Put the table loaded last into service; the device's number. Raises as `create` does."""
        self._checked("put into service", _SUSPEND, name)
        return _number(self._checked("looked at", _STATUS, name))

    def remove(self, name: str, *, deferred: bool = False) -> bool:
        """Remove the device of this name; True if there is none now, False if it is in use.

        Args:
            deferred: have the kernel remove it when its last user is gone.

        Raises:
            RequestError: the kernel refused it for another reason.
        """
        if self._absent():
            return True
        try:
            self._call(_REMOVE, name, _DEFERRED if deferred else 0)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return True
            if error.errno == errno.EBUSY:
                return False
            raise self._failed("removed", name, error) from error
        return not deferred or self.find(name) is None

    def _checked(
        self,
        verb: str,
        command: int,
        name: str,
        flags: int = 0,
        payload: bytes = b"",
        room: int = _BUFFER,
    ) -> bytearray:
        try:
            return self._call(command, name, flags, payload, room)
        except OSError as error:
            raise self._failed(verb, name, error) from error

    def _call(
        self,
        command: int,
        name: str,
        flags: int = 0,
        payload: bytes = b"",
        room: int = _BUFFER,
    ) -> bytearray:
        buffer = bytearray(max(room, _HEADER.size + len(payload)))
        buffer[_HEADER.size : _HEADER.size + len(payload)] = payload
        _HEADER.pack_into(
            buffer,
            0,
            *(4, 0, 0, len(buffer), _HEADER.size, 1 if payload else 0, 0, flags, 0, 0, 0),
            os.fsencode(name),
            b"",
        )
        self._ioctl(3 << 30 | _HEADER.size << 16 | 0xFD << 8 | command, buffer)
        return buffer

    def _absent(self) -> bool:
        """Whether the kernel has no device mapper (yet), and so no mapped devices."""
        if self._ioctl != self._control or self._descriptor >= 0:
            return False
        try:  # a node may be there without it, and to open that one may have it loaded
            return _IN_MISC not in self._kernel.read(os.path.join(self._kernel.proc, "misc"))
        except OSError as error:
            check_absent(error)
            return True

    def _control(self, request: int, buffer: bytearray) -> None:
        with self._lock:
            if self._descriptor < 0:
                self._descriptor = self._open()
        fcntl.ioctl(self._descriptor, request, buffer, True)

    def _open(self) -> int:
        modprobe = programs.find("modprobe")
        if modprobe is not None and self._absent():
            with contextlib.suppress(RequestError):  # to open it tells, too
                programs.run("the device mapper", [modprobe, "dm-mod"])
        path = os.path.join(self._kernel.dev, "mapper/control")
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def _failed(self, verb: str, name: str, error: OSError) -> RequestError:
        if self._absent():
            return RequestError("this guest's kernel has no device mapper (module dm-mod)")
        return RequestError(f"the mapped device {name} could not be {verb}: {words(error)}")


def _number(answer: bytearray) -> str:
    """The device's, which the kernel codes in 32 bits (new_encode_dev)."""
    device = _HEADER.unpack_from(answer)[10]
    return f"{(device >> 8) & 0xFFF}:{(device & 0xFF) | ((device >> 12) & 0xFFF00)}"


def _listed(answer: bytearray) -> Iterator[str]:
    """The names in a list of devices: struct dm_name_list, each with the way to the next."""
    start = _HEADER.size
    device, following = _NAME.unpack_from(answer, start)
    while device:
        end = answer.index(b"\0", start + _NAME.size)
        yield answer[start + _NAME.size : end].decode("utf-8", "replace")
        if not following:
            return
        start += following
        device, following = _NAME.unpack_from(answer, start)
