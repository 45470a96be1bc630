"""Mapped devices by ioctl, against a device mapper that keeps what it is told in a dictionary."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

import pytest
from support.mapper import DEFERRED, LOAD, READ_ONLY, REMOVE, SUSPEND, FakeMapper

from hotlun.agent.devmapper import DeviceMapper, Table
from hotlun.agent.errors import RequestError
from hotlun.agent.kernel import Kernel

if TYPE_CHECKING:
    from pathlib import Path


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


def test_one_question_tells_what_there_is(mapper: DeviceMapper, kernel: FakeMapper) -> None:
    """By the beginnings of names, also if more answer than there was room for at first."""
    assert mapper.names("disk-1-") == []
    mapper.define("disk-10-")
    assert mapper.names("disk-1-") == []
    mapper.define("disk-1-crypt")
    for number in range(300):
        mapper.define(f"others-{number}-disk-1-")
    mapper.define("disk-1-integrity")
    assert mapper.names("disk-1-") == ["disk-1-crypt", "disk-1-integrity"]


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
