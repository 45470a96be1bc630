"""What the QEMU backend says that a guest is to find, against what a real QEMU shows to it."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest
from support.qemu import QEMU, attachment, connected, loop_device, make_image

from hotlun import DiskIdentity
from hotlun.backends import base
from hotlun.errors import SlotTakenError
from hotlun.model import DiskKind, ImageFormat

if TYPE_CHECKING:
    from pathlib import Path

    from hotlun.backends.qemu import QEMUHostBackend
    from hotlun.model import Attachment

pytestmark = pytest.mark.qemu

RAW, QCOW2, VHD, VHDX = ImageFormat
PHYSICAL = DiskKind.PHYSICAL_DISK
MIB = 1 << 20
VHDX_SIZE_AT = (3 << 20) + (1 << 16) + 8
"""Where a VHDX that QEMU made has its size."""


async def shown(vm: QEMU, disk: Attachment) -> int:
    """The disk's size in bytes, as QEMU has it for the guest."""
    image = (await vm.nodes())[f"hotlun-{disk.serial}"]["image"]
    assert isinstance(image, dict)
    return int(image["virtual-size"])


async def assert_size_is_known(vm: QEMU, host: QEMUHostBackend, disk: Attachment) -> None:
    """Serial and size while it is attached, nothing but the serial before and after."""
    bare = DiskIdentity(disk.serial)
    assert base.identity(host, disk) == bare
    await host.attach(disk)
    assert base.identity(host, disk) == DiskIdentity(disk.serial, await shown(vm, disk))
    await host.detach(disk)
    assert base.identity(host, disk) == bare


@pytest.mark.parametrize("size", [512, MIB - 1, MIB, MIB + 1, MIB + 511, (1 << 42) + 512])
async def test_raw_images(vm: QEMU, host: QEMUHostBackend, tmp_path: Path, size: int) -> None:
    """A last sector that is not whole counts."""
    path = tmp_path / "disk.raw"
    path.touch()
    os.truncate(path, size)
    await assert_size_is_known(vm, host, attachment(path))
    await assert_size_is_known(vm, host, attachment(path, read_only=True))


@pytest.mark.parametrize(
    "options",
    [[], ["compat=0.10"], ["extended_l2=on"], ["cluster_size=512"], ["lazy_refcounts=on"]],
)
async def test_qcow2_images(
    vm: QEMU, host: QEMUHostBackend, tmp_path: Path, options: list[str]
) -> None:
    """Of every make, and with a size that qemu-img would not make."""
    more = [word for option in options for word in ("-o", option)]
    path = make_image(tmp_path / "disk.qcow2", "qcow2", "8M", *more)
    for size in (8 * MIB, 8 * MIB - 1, 8 * MIB - 511, 5 * MIB + 100):
        write(path, 24, struct.pack(">Q", size))
        await assert_size_is_known(vm, host, attachment(path, format=QCOW2))


async def test_qcow2_images_over_others(vm: QEMU, tmp_path: Path) -> None:
    """The size is the upper one's, whatever is below."""
    below = make_image(tmp_path / "below.raw", "raw", "16M")
    path = make_image(tmp_path / "disk.qcow2", "qcow2", "8M", "-b", below, "-F", "raw")
    async with connected(vm, allow_backing=[below]) as host:
        await assert_size_is_known(vm, host, attachment(path, format=QCOW2))


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
async def test_vhdx_images(vm: QEMU, host: QEMUHostBackend, tmp_path: Path, subformat: str) -> None:
    """Of both kinds, and with a size that is no whole number of sectors."""
    path = make_image(tmp_path / "disk.vhdx", "vhdx", "8M", "-o", f"subformat={subformat}")
    for size in (8 * MIB, 8 * MIB - 1, 8 * MIB - 512, 5 * MIB + 511):
        write(path, VHDX_SIZE_AT, struct.pack("<Q", size))
        await assert_size_is_known(vm, host, attachment(path, format=VHDX))


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
async def test_vhd_images(host: QEMUHostBackend, tmp_path: Path, subformat: str) -> None:
    """Nobody but QEMU knows which of their two sizes counts."""
    path = make_image(tmp_path / "disk.vhd", "vpc", "8M", "-o", f"subformat={subformat}")
    disk = attachment(path, format=VHD)
    await host.attach(disk)
    assert host.identity(disk) == DiskIdentity(disk.serial)
    await host.detach(disk)


@pytest.mark.root
@pytest.mark.parametrize("size", [MIB, MIB + 511, MIB + 512])
async def test_host_block_devices(
    vm: QEMU, host: QEMUHostBackend, tmp_path: Path, size: int
) -> None:
    """As many sectors as the host has of it."""
    path = tmp_path / "disk.raw"
    path.touch()
    os.truncate(path, size)
    with loop_device(path) as device:
        await assert_size_is_known(vm, host, attachment(device, kind=PHYSICAL, format=None))
    with loop_device(path, read_only=True) as device:
        disk = attachment(device, kind=PHYSICAL, format=None, read_only=True)
        await assert_size_is_known(vm, host, disk)


async def test_what_was_refused_has_no_size(host: QEMUHostBackend, tmp_path: Path) -> None:
    """An attach that failed leaves nothing to remember."""
    there, newcomer = (
        attachment(make_image(tmp_path / name, "raw", "1M"), lun=4) for name in ("a", "b")
    )
    await host.attach(there)
    with pytest.raises(SlotTakenError):
        await host.attach(newcomer)
    assert host.identity(newcomer) == DiskIdentity(newcomer.serial)
    assert host.identity(there) == DiskIdentity(there.serial, MIB)
    await host.detach(there)


async def test_what_another_process_attached_has_no_size(vm: QEMU, tmp_path: Path) -> None:
    """The serial is the attachment's own, and stays."""
    disk = attachment(make_image(tmp_path / "a", "raw", "1M"))
    async with connected(vm) as host:
        await host.attach(disk)
    async with connected(vm) as host:
        assert host.identity(disk) == DiskIdentity(disk.serial)
        await host.detach(disk)


def write(path: str, offset: int, data: bytes) -> None:
    """Write over some bytes of an image."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
