"""Disks that go with a VM in a live migration, from one real QEMU to another."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from support.qemu import (
    QEMU,
    ScriptedMonitor,
    attachment,
    connected,
    loop_device,
    make_image,
    running_qemu,
)

from hotlun.backends.qemu import QEMUHostBackend
from hotlun.errors import BackendError
from hotlun.model import DiskIdentity, DiskKind, ImageFormat, Presence

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from hotlun.model import Attachment

pytestmark = pytest.mark.qemu

RAW, QCOW2, VHD, VHDX = ImageFormat
DEADLINE = 30.0
MIB = 1 << 20


def three(tmp_path: Path) -> list[Attachment]:
    """A raw image, a qcow2, and one that is only read."""
    return [
        attachment(make_image(tmp_path / "a.raw", "raw"), lun=2),
        attachment(make_image(tmp_path / "b.qcow2", "qcow2", "8M"), format=QCOW2, controller=1),
        attachment(make_image(tmp_path / "c.raw", "raw"), lun=5, controller=1, read_only=True),
    ]


@asynccontextmanager
async def destination(
    tmp_path: Path, arguments: Sequence[str], *more: str
) -> AsyncIterator[tuple[QEMU, str]]:
    """A QEMU that waits for a migration; with the address to migrate to."""
    folder = tmp_path / "there"
    folder.mkdir(exist_ok=True)
    address = f"unix:{folder / 'migration.sock'}"
    async with running_qemu(folder, *more, *arguments, "-incoming", address) as vm:
        yield vm, address


async def migrate(vm: QEMU, address: str) -> str:
    """Migrate the VM; how that ended."""
    await vm.client.execute("migrate", {"uri": address})
    async with asyncio.timeout(DEADLINE):
        while True:
            answer = await vm.client.execute("query-migrate")
            assert isinstance(answer, dict)
            if answer["status"] in ("completed", "failed"):
                return str(answer["status"])
            await asyncio.sleep(0.02)


async def test_disks_migrate(vm: QEMU, tmp_path: Path) -> None:
    """All are there at their slots, as known as if they were attached there, and go cleanly."""
    disks = three(tmp_path)
    async with connected(vm) as host:
        await asyncio.gather(*map(host.attach, disks))
        sizes = {disk.serial: host.identity(disk) for disk in disks}
        await vm.client.execute("cont")
        async with destination(tmp_path, host.device_arguments()) as (there, address):
            assert await migrate(vm, address) == "completed"
            await vm.client.execute("quit")
            await vm.process.wait()
            async with connected(there) as other:
                assert await other.survey(disks) == dict.fromkeys(sizes, Presence.PRESENT)
                assert {disk.serial: other.identity(disk) for disk in disks} == sizes
                assert await other.occupied() == {disk.slot for disk in disks}
                assert [(await there.nodes())[f"hotlun-{disk.serial}"]["ro"] for disk in disks] == [
                    False,
                    False,
                    True,
                ]
                for disk in disks:
                    where = f"/machine/peripheral/hotlun-{disk.serial}"
                    assert await there.get(where, "serial") == disk.serial
                    assert await there.get(where, "device_id") == disk.serial
                await asyncio.gather(*map(other.detach, disks))
                assert await there.is_bare()
                newcomer = attachment(disks[0].disk.path, lun=2)
                await other.attach(newcomer)
                await other.detach(newcomer)


async def test_what_another_process_attached_migrates_too(vm: QEMU, tmp_path: Path) -> None:
    """A survey is enough to know it by: its arguments are those of who attached it."""
    disks = three(tmp_path)
    async with connected(vm) as host:
        await asyncio.gather(*map(host.attach, disks))
        made = host.device_arguments()
    async with connected(vm) as host:
        assert host.device_arguments() == []
        await host.survey(disks)
        for disk in disks:
            os.rename(disk.disk.path, f"{disk.disk.path}.away")
        assert host.device_arguments() == made
        for disk in disks:
            os.rename(f"{disk.disk.path}.away", disk.disk.path)
        await asyncio.gather(*map(host.detach, disks))
        assert host.device_arguments() == []


async def test_to_other_paths(vm: QEMU, tmp_path: Path) -> None:
    """Whole paths and folders are exchanged, through links too; the longest that fits counts."""
    disks = three(tmp_path)
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    paths = {
        str(tmp_path / "link"): str(there),
        disks[0].disk.path: str(there / "renamed.raw"),
        disks[0].disk.path[:-1]: "/nowhere",
    }
    async with connected(vm) as host:
        await asyncio.gather(*map(host.attach, disks))
        arguments = host.device_arguments(paths=paths)
        for disk, name in zip(disks, ("renamed.raw", "b.qcow2", "c.raw"), strict=True):
            shutil.copy(disk.disk.path, there / name)
        async with destination(tmp_path, arguments) as (other, address):
            await vm.client.execute("cont")
            assert await migrate(vm, address) == "completed"
            files = {node["file"] for node in (await other.nodes()).values()}
            assert files == {str(there / name) for name in ("renamed.raw", "b.qcow2", "c.raw")}


async def test_backing_files(vm: QEMU, tmp_path: Path) -> None:
    """An allowed one is opened there as here; who did not make the node reads the image for it."""
    below = make_image(tmp_path / "below.raw", "raw", "8M")
    path = make_image(tmp_path / "top.qcow2", "qcow2", "8M", "-b", below, "-F", "raw")
    disk = attachment(path, format=QCOW2)
    async with connected(vm, allow_backing=[below]) as host:
        await host.attach(disk)
        made = host.device_arguments(paths={below: "/b"})
        assert json.loads(made[1])["backing"]["file"]["filename"] == "/b"
        made = host.device_arguments()
    async with connected(vm, allow_backing=[below]) as host:
        await host.survey([disk])
        assert host.device_arguments() == made
        async with destination(tmp_path, made) as (there, address):
            await vm.client.execute("cont")
            assert await migrate(vm, address) == "completed"
            assert (await there.nodes())[f"hotlun-{disk.serial}"]["backing_file"] == below
        os.rename(path, tmp_path / "away")
        with pytest.raises(BackendError, match="cannot be opened"):
            host.device_arguments()


@pytest.mark.root
async def test_block_devices_and_servers(vm: QEMU, tmp_path: Path) -> None:
    """A block device, and an export of a server whose socket has another name there."""
    path = make_image(tmp_path / "disk.raw", "raw")
    with loop_device(path) as device:
        disk = attachment(device, kind=DiskKind.PHYSICAL_DISK, format=None)
        async with connected(vm) as host:
            await host.attach(disk)
            made = host.device_arguments()
        async with connected(vm) as host:
            await host.survey([disk])
            assert host.identity(disk) == DiskIdentity(disk.serial, MIB)
            assert host.device_arguments() == made
            async with destination(tmp_path, made) as (there, address):
                await vm.client.execute("cont")
                assert await migrate(vm, address) == "completed"
                async with connected(there) as other:
                    assert (await other.survey([disk]))[disk.serial] is Presence.PRESENT
                    await other.detach(disk)


async def test_a_servers_socket(tmp_path: Path) -> None:
    """It has a path, too, and may have another one there."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "nbd.sock"))
        disk = attachment(
            f"unix:{tmp_path}/nbd.sock:x",
            kind=DiskKind.EXTENSIBLE_VIRTUAL_DISK,
            provider="nbd",
            format=None,
        )
        async with (
            ScriptedMonitor.serving(tmp_path) as monitor,
            QEMUHostBackend.connect(monitor.path, controllers=["scsi0"]) as host,
        ):
            await host.attach(disk)
            (_, node, _, device) = host.device_arguments(paths={str(tmp_path): "/there"})
    assert json.loads(node)["file"]["server"] == {"type": "unix", "path": "/there/nbd.sock"}
    assert json.loads(device) | {"lun": 0, "bus": "scsi0.0"} == json.loads(device)


async def test_the_lowest_slot_comes_first(vm: QEMU, tmp_path: Path) -> None:
    """Whatever the order of the attaches; and only what is attached now."""
    disks = three(tmp_path)
    async with connected(vm) as host:
        for disk in reversed(disks):
            await host.attach(disk)
        serials = [
            json.loads(text)["serial"] for text in host.device_arguments() if '"scsi-hd"' in text
        ]
        assert serials == [disk.serial for disk in disks]
        await host.detach(disks[1])
        assert disks[1].serial not in " ".join(host.device_arguments())
        await asyncio.gather(*map(host.detach, disks))


async def test_controllers_at_other_addresses(vm: QEMU, tmp_path: Path) -> None:
    """The state of a disk finds no place: the migration fails, and the source goes on."""
    disks = three(tmp_path)
    async with connected(vm) as host:
        await asyncio.gather(*map(host.attach, disks))
        await vm.client.execute("cont")
        folder = tmp_path / "there"
        folder.mkdir()
        address = f"unix:{folder / 'migration.sock'}"
        controllers = (
            *("-device", "virtio-scsi-pci,id=scsi0,addr=0x1a"),
            *("-device", "virtio-scsi-pci,id=scsi1,addr=0x19"),
        )
        async with running_qemu(
            folder, *controllers, *host.device_arguments(), "-incoming", address, controllers=()
        ) as there:
            await migrate(vm, address)
            async with asyncio.timeout(DEADLINE):
                assert await there.process.wait() == 1
        assert await host.survey(disks) == {disk.serial: Presence.PRESENT for disk in disks}
        await asyncio.gather(*map(host.detach, disks))


async def test_images_are_locked_but_for_a_migration(vm: QEMU, tmp_path: Path) -> None:
    """Without -incoming the second QEMU does not start, and nothing has been changed."""
    disk = three(tmp_path)[0]
    async with connected(vm) as host:
        await host.attach(disk)
        (tmp_path / "there").mkdir()
        with pytest.raises(Exception, match=r"lock|connect|Errno|end-of-file|EOF"):
            async with running_qemu(tmp_path / "there", *host.device_arguments()):
                pass
        await host.detach(disk)


@pytest.mark.parametrize(("format", "made_as"), [(VHD, "vpc"), (VHDX, "vhdx")])
async def test_formats_that_do_not_migrate(
    vm: QEMU,
    tmp_path: Path,
    format: ImageFormat,  # noqa: A002 - the word of the API
    made_as: str,
) -> None:
    """QEMU refuses before anything is sent, and goes on."""
    disk = attachment(make_image(tmp_path / "disk", made_as, "8M"), format=format)
    async with connected(vm) as host:
        await host.attach(disk)
        with pytest.raises(Exception, match="does not support live migration"):
            await vm.client.execute("migrate", {"uri": f"unix:{tmp_path}/x"})
        await host.detach(disk)
