"""The QEMU host backend against a real QEMU, without a guest in it."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import subprocess
from typing import TYPE_CHECKING

import pytest
from support.qemu import QEMU, attachment, connected, loop_device, make_image, running_qemu

from hotlun.backends import base
from hotlun.backends.nodes import block_node
from hotlun.backends.qemu import QEMUHostBackend
from hotlun.errors import BackendError, SlotTakenError, UnsupportedError
from hotlun.model import DiskKind, ImageFormat, Slot

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu

PHYSICAL, PROVIDED = DiskKind.PHYSICAL_DISK, DiskKind.EXTENSIBLE_VIRTUAL_DISK
STEP = re.compile(r"blockdev-\w+|device_\w+|DEVICE_DELETED")
VM_DISKS = (
    *("-drive", "if=none,id=boot,file=null-co://,format=raw"),
    *("-device", "scsi-hd,bus=scsi0.0,lun=3,drive=boot"),
    *("-device", "scsi-cd,bus=scsi0.0,lun=5,id=cd"),
    *("-device", "scsi-cd,bus=scsi0.0,scsi-id=1,lun=6"),
    *("-device", "scsi-cd,bus=scsi1.0,lun=0"),
)


def raw(tmp_path: Path, name: str = "disk.raw") -> str:
    path = tmp_path / name
    path.write_bytes(bytes(1 << 20))
    return str(path)


async def test_keeps_the_contract(host: QEMUHostBackend) -> None:
    """It is a host backend."""
    assert isinstance(host, base.HostBackend)


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("format", "made_as", "options"),
    [
        (ImageFormat.RAW, "raw", []),
        (ImageFormat.QCOW2, "qcow2", []),
        (ImageFormat.QCOW2, "qcow2", ["-o", "extended_l2=on"]),
        (ImageFormat.VHD, "vpc", []),
        (ImageFormat.VHD, "vpc", ["-o", "subformat=fixed"]),
        (ImageFormat.VHDX, "vhdx", []),
        (ImageFormat.VHDX, "vhdx", ["-o", "subformat=fixed"]),
    ],
)
async def test_attaches_images_of_every_format(
    vm: QEMU,
    host: QEMUHostBackend,
    tmp_path: Path,
    format: ImageFormat,  # noqa: A002 - the word of the API
    made_as: str,
    options: list[str],
    read_only: bool,
) -> None:
    """Each is opened as stated, as writable as asked for, and taken out without a trace."""
    disk = attachment(
        make_image(tmp_path / "disk", made_as, "8M", *options),
        lun=7,
        format=format,
        read_only=read_only,
        controller=1,
    )
    await host.attach(disk)
    (name,) = await vm.devices()
    node = (await vm.nodes())[name]
    assert disk.serial in name
    assert (node["drv"], node["ro"]) == (made_as, read_only)
    where = f"/machine/peripheral/{name}"
    properties = [await vm.get(where, key) for key in ("lun", "scsi-id", "serial", "device_id")]
    assert properties == [7, 0, disk.serial, disk.serial]
    assert "/scsi1/" in str(await vm.get(where, "parent_bus"))
    await host.detach(disk)


async def test_what_is_not_there_is_detached_without_complaint(
    host: QEMUHostBackend, tmp_path: Path
) -> None:
    """Before an attach, after a detach: nothing to undo is no error."""
    disk = attachment(raw(tmp_path))
    await host.detach(disk)
    await host.attach(disk)
    await host.detach(disk)
    await host.detach(disk)


async def test_a_node_without_its_device_is_detached(
    vm: QEMU, host: QEMUHostBackend, tmp_path: Path
) -> None:
    """What an attach of unknown outcome may leave, half of it, goes too."""
    disk = attachment(raw(tmp_path))
    await vm.client.execute(
        "blockdev-add",
        {"driver": "null-co", "node-name": f"hotlun-{disk.serial}", "read-zeroes": True},
    )
    await host.detach(disk)


async def test_a_removal_already_under_way_is_waited_for(
    vm: QEMU, host: QEMUHostBackend, tmp_path: Path
) -> None:
    """A second detach, and one after somebody else's device_del, end when the node is gone."""
    disk = attachment(raw(tmp_path))
    await host.attach(disk)
    await vm.client.execute("device_del", {"id": f"hotlun-{disk.serial}"})
    await asyncio.gather(*(host.detach(disk) for _ in range(3)))


async def test_many_disks_at_once(
    vm: QEMU, host: QEMUHostBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """64 attaches, then 64 detaches side by side: all wait for QEMU at the same time."""
    disks = [attachment(raw(tmp_path, f"{lun}.raw"), lun) for lun in range(64)]
    await asyncio.gather(*map(host.attach, disks))
    assert await host.occupied() == {disk.slot for disk in disks}
    caplog.set_level(logging.DEBUG, "hotlun.qemu")
    caplog.clear()
    await asyncio.gather(*map(host.detach, disks))
    steps = [step[0] for step in map(STEP.search, caplog.messages) if step]
    assert steps[:64] == ["device_del"] * 64
    assert sorted(steps[64:]) == ["DEVICE_DELETED"] * 64 + ["blockdev-del"] * 64
    assert await host.occupied() == set()


async def test_a_late_detach_spares_the_next_disk(
    vm: QEMU, host: QEMUHostBackend, tmp_path: Path
) -> None:
    """An attachment is addressed by its serial: the same disk at the same slot is another."""
    path = raw(tmp_path)
    old, new = attachment(path), attachment(path)
    await host.attach(old)
    await host.detach(old)
    await host.attach(new)
    await host.detach(old)
    assert await vm.devices() == {f"hotlun-{new.serial}"}
    await host.detach(new)


async def test_a_taken_slot_is_told_apart(host: QEMUHostBackend, tmp_path: Path) -> None:
    """The newcomer gets SlotTakenError, leaves nothing, and the disk there stays."""
    there, newcomer = (attachment(raw(tmp_path, name), lun=4) for name in ("a", "b"))
    await host.attach(there)
    with pytest.raises(SlotTakenError) as caught:
        await host.attach(newcomer)
    assert (caught.value.slot, caught.value.disk) == (Slot(0, 4), newcomer.disk)
    assert (caught.value.operation, caught.value.code) == ("attach", "GenericError")
    assert "lun already used" in caught.value.detail
    await host.detach(newcomer)
    assert await host.occupied() == {Slot(0, 4)}
    await host.detach(there)


async def test_a_disk_in_use_by_another_is_refused(host: QEMUHostBackend, tmp_path: Path) -> None:
    """A file attached writable is not attached again, here or in another VM."""
    path = raw(tmp_path)
    first, again, reader = (attachment(path, lun, read_only=lun == 2) for lun in range(3))
    await host.attach(first)
    for other in (again, reader):
        with pytest.raises(BackendError, match="another user has the disk open") as caught:
            await host.attach(other)
        assert "lock" in caught.value.detail
    (tmp_path / "other").mkdir()
    async with running_qemu(tmp_path / "other") as vm, connected(vm) as elsewhere:
        with pytest.raises(BackendError, match="another user has the disk open"):
            await elsewhere.attach(attachment(path))
        assert await vm.is_bare()
    await host.detach(first)


async def test_readers_share_a_disk(host: QEMUHostBackend, tmp_path: Path) -> None:
    """Read-only attachments of one file do not exclude each other."""
    disks = [attachment(raw(tmp_path), lun, read_only=True) for lun in range(2)]
    await asyncio.gather(*map(host.attach, disks))
    await asyncio.gather(*map(host.detach, disks))


async def test_unusable_disks_are_refused_before_the_first_command(
    host: QEMUHostBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bad path, format or slot: the error says so, and QEMU never hears of it."""
    caplog.set_level(logging.DEBUG, "hotlun.qemu")
    caplog.clear()
    image = raw(tmp_path)
    qcow2 = make_image(tmp_path / "disk.qcow2", "qcow2")
    cut = make_image(tmp_path / "cut.vhdx", "vhdx", "8M")
    os.truncate(cut, 1 << 20)
    odd = raw(tmp_path, os.fsdecode(b"disk\xff.raw"))
    (tmp_path / "to-odd.raw").symlink_to(odd)
    for disk, words in (
        (attachment(tmp_path / "none"), "No such file"),
        (attachment(tmp_path), "is a directory"),
        (attachment("/dev/null"), "not a regular file"),
        (attachment(image, format=None), "format of the image is not stated"),
        (attachment(image, format=ImageFormat.VHDX), "not a usable vhdx"),
        (attachment(qcow2, format=ImageFormat.VHD), "not a usable vhd"),
        (attachment(cut, format=ImageFormat.VHDX), "truncated"),
        (attachment(image, kind=PHYSICAL), "not a block device"),
        (attachment(tmp_path / "none", kind=PHYSICAL), "No such file"),
        (attachment("/dev/null", kind=PHYSICAL, format=ImageFormat.VHD), "leave it out"),
        (attachment("/tmp", kind=PROVIDED, provider="nbd", format=None), "evd://nbd/"),
        (attachment(odd), "not UTF-8"),
        (attachment(tmp_path / "to-odd.raw"), "not UTF-8"),
        (attachment(f"unix:{odd}", kind=PROVIDED, provider="nbd", format=None), "not UTF-8"),
    ):
        with pytest.raises(BackendError, match=words) as caught:
            await host.attach(disk)
        assert caught.value.disk == disk.disk
        assert caught.value.slot == disk.slot
        assert caught.value.operation == "attach"
    for disk, words in (
        (attachment(image, controller=2), "scsi0, scsi1"),
        (attachment(image, lun=256), "LUNs 0 to 255"),
        (attachment("x", kind=PROVIDED, provider="ceph", format=None), "there is nbd"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            await host.attach(disk)
    assert not caplog.records


async def test_a_backing_file_is_opened_only_if_allowed(vm: QEMU, tmp_path: Path) -> None:
    """A qcow2 that names /etc/passwd is refused; one that names what the caller allows is not."""
    base_image = make_image(tmp_path / "base.qcow2", "qcow2", "8M")
    (tmp_path / "passwd").write_bytes(b"secret" * 512)
    options = ["-b", base_image, "-F", "qcow2"]
    good = make_image(tmp_path / "good.qcow2", "qcow2", "8M", *options)
    options = ["-b", str(tmp_path / "passwd"), "-F", "raw"]
    evil = make_image(tmp_path / "evil.qcow2", "qcow2", "8M", *options)
    async with QEMUHostBackend.connect(
        vm.qmp_socket, controllers=["scsi0"], allow_backing=[base_image]
    ) as host:
        disk = attachment(good, format=ImageFormat.QCOW2)
        await host.attach(disk)
        await host.detach(disk)
        with pytest.raises(BackendError, match="not allowed"):
            await host.attach(attachment(evil, format=ImageFormat.QCOW2))
    assert await vm.is_bare()


async def test_an_image_that_gains_a_backing_file_too_late_is_not_followed(
    vm: QEMU, host: QEMUHostBackend, tmp_path: Path
) -> None:
    """QEMU is told to open nothing below, whatever the image says by the time it looks."""
    disk = attachment(make_image(tmp_path / "d.qcow2", "qcow2"), format=ImageFormat.QCOW2)
    checked = block_node(disk.disk, f"hotlun-{disk.serial}")
    secret = raw(tmp_path, "secret")
    _rebase(disk.disk.path, secret)
    await vm.client.execute("blockdev-add", checked.arguments)
    (node,) = (await vm.nodes()).values()
    assert node["backing_file_depth"] == 0
    opened = {os.readlink(link) for link in _descriptors(vm)}
    assert disk.disk.path in opened
    assert secret not in opened
    await host.detach(disk)
    assert disk.disk.path not in {os.readlink(link) for link in _descriptors(vm)}


def _rebase(image: str, backing: str) -> None:
    options = ("-u", "-b", backing, "-F", "raw")
    subprocess.run(["qemu-img", "rebase", *options, image], check=True)


def _descriptors(vm: QEMU) -> list[str]:
    folder = f"/proc/{vm.process.pid}/fd"
    return [os.path.join(folder, name) for name in os.listdir(folder)]


async def test_the_vms_own_disks_are_found(tmp_path: Path) -> None:
    """Occupied are the slots of devices with and without ids; target 1 holds no slot."""
    async with running_qemu(tmp_path, *VM_DISKS) as vm, connected(vm) as host:
        assert await base.occupied(host) == {Slot(0, 3), Slot(0, 5), Slot(1, 0)}
        with pytest.raises(SlotTakenError):
            await host.attach(attachment(raw(tmp_path), lun=3))
        assert not await vm.devices()


async def test_controllers_are_numbered_in_our_order(tmp_path: Path) -> None:
    """The first named controller is number 0, whatever order the VM has."""
    async with (
        running_qemu(tmp_path, *VM_DISKS) as vm,
        connected(vm, controllers=("scsi1", "scsi0")) as host,
    ):
        assert await host.occupied() == {Slot(1, 3), Slot(1, 5), Slot(0, 0)}


async def test_other_models_of_controller_do(tmp_path: Path) -> None:
    """A controller is whatever has a SCSI bus."""
    options = ("-device", "lsi53c895a,id=lsi")
    async with (
        running_qemu(tmp_path, *options) as vm,
        connected(vm, controllers=["lsi"]) as host,
    ):
        disk = attachment(raw(tmp_path))
        await host.attach(disk)
        assert await host.occupied() == {Slot(0, 0)}
        await host.detach(disk)


@pytest.mark.parametrize("names", [["scsi0", "scsi7"], ["ide"], ["virtio-backend", "x.y"]])
async def test_a_controller_that_is_missing(tmp_path: Path, names: list[str]) -> None:
    """Connecting says which controller the VM lacks, and which it has."""
    async with running_qemu(tmp_path) as vm:
        with pytest.raises(BackendError, match=r"it has: scsi0, scsi1\.") as caught:
            async with connected(vm, controllers=names):
                pass
        assert names[-1] in str(caught.value)
        async with connected(vm):
            pass


async def test_a_vm_without_any_controller(tmp_path: Path) -> None:
    """Connecting says that there is none."""
    async with running_qemu(tmp_path, controllers=()) as vm:
        with pytest.raises(BackendError, match=r"it has: none\."):
            async with connected(vm):
                pass


@pytest.mark.parametrize(
    "arguments",
    [
        {"controllers": "scsi0"},
        {"controllers": ()},
        {"controllers": ("scsi0", "scsi0")},
        {"controllers": ("../x",)},
        {"timeout": 0},
    ],
)
async def test_wrong_arguments(arguments: dict[str, object]) -> None:
    """What cannot be meant is a ValueError before anything is tried."""
    with pytest.raises(ValueError, match=r"controller|device|timeout"):
        async with QEMUHostBackend.connect("/nowhere", **arguments):  # type: ignore[arg-type] # wrong ones
            pass


async def test_every_step_is_logged(
    host: QEMUHostBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At DEBUG, with disk, slot and serial."""
    caplog.set_level(logging.DEBUG, "hotlun")
    caplog.clear()
    disk = attachment(raw(tmp_path), lun=9)
    await host.attach(disk)
    await host.detach(disk)
    lines = caplog.messages
    assert all(f"{disk.disk.path} at slot 0:9 as {disk.serial}" in line for line in lines)
    assert [step and step[0] for step in map(STEP.search, lines)] == [
        *("blockdev-add", "device_add"),
        *("device_del", "DEVICE_DELETED", "blockdev-del"),
    ]


@pytest.mark.root
@pytest.mark.parametrize("read_only", [False, True])
async def test_host_block_devices(
    vm: QEMU, host: QEMUHostBackend, tmp_path: Path, read_only: bool
) -> None:
    """A physical disk is found through a link, and is as writable as asked for."""
    link = tmp_path / "by-name"
    with loop_device(raw(tmp_path)) as device:
        link.symlink_to(device)
        disk = attachment(link, kind=PHYSICAL, format=None, read_only=read_only)
        await host.attach(disk)
        (node,) = (await vm.nodes()).values()
        assert (node["ro"], node["file"]) == (read_only, device)
        await host.detach(disk)


@pytest.mark.root
async def test_a_block_device_is_taken_for_what_it_is(
    host: QEMUHostBackend, tmp_path: Path
) -> None:
    """One that cannot be written is not attached for writing, nor one as an image."""
    with loop_device(raw(tmp_path), read_only=True) as device:
        with pytest.raises(BackendError, match="attach it read-only"):
            await host.attach(attachment(device, kind=PHYSICAL, format=None))
        with pytest.raises(BackendError, match="as a physical disk"):
            await host.attach(attachment(device, read_only=True))
