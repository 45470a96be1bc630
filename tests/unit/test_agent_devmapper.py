"""Mapped devices by ioctl, against a device mapper that keeps its devices in a dictionary."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from hotlun.agent.devmapper import DeviceMapper, Table
from hotlun.agent.errors import RequestError
from hotlun.agent.kernel import Kernel

if TYPE_CHECKING:
    from pathlib import Path

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
        listed = b"".join(
            struct.pack("=QI", 253 << 8, 0) + name.encode() + b"\0" for name in self.devices
        )
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


@pytest.fixture
def kernel() -> FakeMapper:
    return FakeMapper()


@pytest.fixture
def mapper(kernel: FakeMapper) -> DeviceMapper:
    return DeviceMapper(Kernel(), kernel)


def test_a_device_is_made_found_and_removed(mapper: DeviceMapper, kernel: FakeMapper) -> None:
    """With its table in service, and its number as sysfs writes numbers."""
    assert mapper.find("a") is None
    assert mapper.create("other", Table(8, "linear", "8:0 0")) == "253:0"
    assert mapper.create("a", Table(2048, "verity", "1 8:0 8:0 x")) == "253:1"
    assert kernel.devices["a"] == ["0 2048 verity 1 8:0 8:0 x", ""]
    assert mapper.find("a") == "253:1"
    assert mapper.table("a") == "1 8:0 8:0 x"
    assert mapper.remove("a") is True
    assert list(kernel.devices) == ["other"]
    assert mapper.table("a") == ""


def test_what_is_not_there_is_removed(mapper: DeviceMapper) -> None:
    """Undoing what is not there is success."""
    assert mapper.remove("a") is True
    assert mapper.remove("a", deferred=True) is True


def test_one_question_tells_whether_to_look(mapper: DeviceMapper, kernel: FakeMapper) -> None:
    """For devices by the beginning of their names; what is too long to be listed may be there."""
    assert not mapper.may_have("disk-1-")
    mapper.define("disk-11-a")
    assert not mapper.may_have("disk-1-")
    mapper.define("disk-1-b")
    assert mapper.may_have("disk-1-")
    mapper.remove("disk-1-b")
    for number in range(400):
        kernel.devices[f"another-{number}"] = ["", ""]
    assert mapper.may_have("disk-1-")


def test_what_is_in_use_stays(mapper: DeviceMapper, kernel: FakeMapper) -> None:
    """Unless it is to go when it is free."""
    mapper.create("a", Table(8, "linear", "8:0 0"))
    kernel.busy.add("a")
    assert mapper.remove("a") is False
    assert kernel.flags[REMOVE] == 0
    assert mapper.remove("a", deferred=True) is False
    assert kernel.flags[REMOVE] == DEFERRED


def test_a_table_can_be_taken_back(mapper: DeviceMapper, kernel: FakeMapper) -> None:
    """Before it is in service; the next one takes its place."""
    mapper.define("a")
    mapper.load("a", Table(8, "integrity", "first"))
    mapper.unload("a")
    assert kernel.devices["a"] == ["", ""]
    mapper.load("a", Table(16, "integrity", "second", read_only=True))
    assert kernel.flags[LOAD] == READ_ONLY
    mapper.resume("a")
    assert kernel.devices["a"][0] == "0 16 integrity second"


@pytest.mark.parametrize("refused", [LOAD, SUSPEND])
def test_what_the_kernel_refuses_is_not_there(
    mapper: DeviceMapper, kernel: FakeMapper, refused: int
) -> None:
    """The error has the device's name and the kernel's word; nothing is left."""
    kernel.refused.add(refused)
    with pytest.raises(RequestError, match=r"mapped device a could not be .*: Invalid argument"):
        mapper.create("a", Table(8, "crypt", "aes"))
    assert not kernel.devices


def test_a_device_number_beyond_a_byte() -> None:
    """The kernel's 32 bits: 12 of the major number between 20 of the minor one."""

    def ioctl(request: int, buffer: bytearray) -> None:
        minor = 0x12345
        struct.pack_into("=Q", buffer, 40, 253 << 8 | minor & 0xFF | (minor & ~0xFF) << 12)

    assert DeviceMapper(Kernel(), ioctl).find("a") == f"253:{0x12345}"


@pytest.mark.parametrize("has_node", [False, True])
def test_a_kernel_without_device_mapper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_node: bool
) -> None:
    """Has no mapped devices, and says so when one is to be made; a node alone proves nothing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "misc").write_text(" 10 loop-control\n")
    if has_node:
        (tmp_path / "mapper").mkdir()
        with socket.socket(socket.AF_UNIX) as listener:  # which cannot be opened
            listener.bind(str(tmp_path / "mapper/control"))
    mapper = DeviceMapper(Kernel(dev=str(tmp_path), proc=str(tmp_path)))
    assert mapper.find("a") is None
    assert mapper.remove("a") is True
    with pytest.raises(RequestError, match="no device mapper"):
        mapper.create("a", Table(8, "crypt", "aes"))
