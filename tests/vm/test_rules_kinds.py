"""Disks that are no image files, and a VM that runs as another user."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from support import disks
from support.guest_shell import block_name, mounted_at, note_in, shell
from support.machine import look

from hotlun import BackendError, DiskConflictError, HotlunError, Manager, MountConfig, SlotState
from hotlun.vm import Machine

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.asyncio(loop_scope="module")

MOUNTED = MountConfig()
NOBODY = "65534"


@pytest.mark.root
class TestPhysicalDisks:
    async def test_are_block_devices_of_the_host(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """What the guest writes is on the device; and any node of it is the same disk."""
        path = disks.ext4(tmp_path / "disk", "physical")
        link = tmp_path / "by-name"
        with disks.loop_device(path) as device:
            link.symlink_to(device)
            mount = await manager.add_physical_disk(device, mount=MOUNTED)
            assert await note_in(shared_vm, mount) == "physical"
            assert (await manager.add_physical_disk(link, mount=MOUNTED)).slot == mount.slot
            with pytest.raises(DiskConflictError, match="PassThru"):
                await manager.add_virtual_disk(device, mount=MOUNTED)
            await shell(shared_vm, f"echo written > {mount.guest_path}/note")
            await manager.release_all()
        assert disks.ext4_file(path, "note") == "written\n"

    async def test_are_read_only_if_asked_for(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """A device that cannot be written is attached read-only, and not otherwise."""
        path = disks.ext4(tmp_path / "disk", "physical")
        with disks.loop_device(path, "--read-only") as device:
            with pytest.raises(BackendError, match="read-only") as caught:
                await manager.add_physical_disk(device, mount=MOUNTED)
            assert device in str(caught.value)
            mount = await manager.add_physical_disk(device, read_only=True, mount=MOUNTED)
            assert await note_in(shared_vm, mount) == "physical"
            assert "ro" in (await mounted_at(shared_vm, mount)).options
            await mount.release()

    async def test_may_have_partitions(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """Partitions are the guest's business."""
        path = disks.partitioned(tmp_path / "disk", "dos", {1: "one", 2: "two"})
        with disks.loop_device(path) as device:
            mount = await manager.add_physical_disk(device, mount=MountConfig(partition=2))
            assert await note_in(shared_vm, mount) == "two"
            await mount.release()


class TestExtensibleDisks:
    async def test_come_from_an_nbd_server(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """Written, released, attached again: the server has kept it."""
        path = disks.ext4(tmp_path / "disk.raw", "exported")
        socket = tmp_path / "nbd.sock"
        url = f"evd://nbd/unix:{socket}:a name/with: odd characters"
        with disks.nbd_server(path, socket, "a name/with: odd characters"):
            mount = await manager.add_extensible_virtual_disk(url, mount=MOUNTED)
            assert await note_in(shared_vm, mount) == "exported"
            await shell(shared_vm, f"echo written > {mount.guest_path}/note")
            await mount.release()
            mount = await manager.add_extensible_virtual_disk(url, read_only=True, mount=MOUNTED)
            assert await note_in(shared_vm, mount) == "written\n"
            assert "ro" in (await mounted_at(shared_vm, mount)).options
            await mount.release()
        assert disks.ext4_file(path, "note") == "written\n"

    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("evd://nbd/unix:{socket}:other", "no such export"),
            ("evd://nbd/unix:{socket}.gone", "start the server"),
            ("evd://nbd/127.0.0.1:1", "cannot be reached"),
            ("evd://nbd/nonsense", "evd://nbd/unix:"),
            ("evd://ceph/pool/image", "no provider 'ceph'"),
        ],
    )
    async def test_that_cannot_be_had(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path, url: str, words: str
    ) -> None:
        """A wrong export, server, address or provider is named, and costs no slot."""
        before = await look(shared_vm)
        path = disks.ext4(tmp_path / "disk.raw")
        socket = tmp_path / "nbd.sock"
        with (
            disks.nbd_server(path, socket, "export"),
            pytest.raises(HotlunError, match=words) as caught,
        ):
            await manager.add_extensible_virtual_disk(url.format(socket=socket), mount=MOUNTED)
        assert url.format(socket=socket) in str(caught.value)
        assert await look(shared_vm) == before
        assert {status.state for status in manager.slots()} == {SlotState.FREE}


@pytest.mark.root
async def test_a_vm_of_another_user_is_let_in_and_shut_out_again(tmp_path: Path) -> None:
    """With `vm_id` its user may open the image, below folders that were shut; undone exactly."""
    folder = tmp_path / "shut" / "deeper"
    folder.mkdir(parents=True)
    (tmp_path / "shut").chmod(0o700)
    path = disks.ext4(folder / "disk.raw", "let in")
    path.chmod(0o600)
    before = _access(tmp_path)
    async with Machine.start(user=NOBODY) as vm:
        empty = await look(vm)
        async with Manager(vm.host, vm.guest) as manager:
            with pytest.raises(BackendError, match="give that user as vm_id"):
                await manager.add_virtual_disk(path, mount=MOUNTED)
            mount = await manager.add_virtual_disk(path, vm_id=NOBODY, mount=MOUNTED)
            assert await note_in(vm, mount) == "let in"
            assert _access(tmp_path) != before
            name = await block_name(vm, mount)
            await shell(vm, f"echo written > {mount.guest_path}/note; test -b /dev/{name}")
            again = await manager.add_virtual_disk(path, vm_id=NOBODY, mount=MOUNTED)
            await mount.release()
            assert _access(tmp_path) != before
            await again.release()
            assert _access(tmp_path) == before
            with pytest.raises(BackendError, match="no user"):
                await manager.add_virtual_disk(path, vm_id="no such user", mount=MOUNTED)
        assert await look(vm) == empty
    assert _access(tmp_path) == before
    assert disks.ext4_file(path, "note") == "written\n"


def _access(folder: Path) -> list[object]:
    """Who may do what, below a folder and above it: modes, owners, access control lists."""
    paths = [*folder.parents, folder, *sorted(folder.rglob("*"))]
    return [
        (
            path,
            status.st_mode,
            status.st_uid,
            [(n, os.getxattr(path, n)) for n in os.listxattr(path)],
        )
        for path, status in ((path, path.stat()) for path in paths)
    ]
