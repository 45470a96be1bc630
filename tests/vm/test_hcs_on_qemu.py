"""The story of the compute service's disks, told on real ones: the shipped backends, a whole VM.

Behind the service stands QEMU (`support.hcs_on_qemu`); in front of it nothing is known of that.
Each test begins and ends with a bare VM, and with no document that hcsshim would not have sent.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest
from support import disks
from support.guest_shell import mounted_at, note_in, shell
from support.hcs_managers import managed, status_of, used, verbs
from support.hcs_on_qemu import ID, HCSOnQEMU
from support.hcs_pairs import NEWEST, OLDEST, image
from support.machine import look
from support.pairs import TAKEN

from hotlun import (
    BackendError,
    DiskConflictError,
    HotlunError,
    MountConfig,
    Secret,
    Slot,
    SlotState,
)
from hotlun.errors import VMGoneError
from hotlun.vm import Machine

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.asyncio(loop_scope="module")

MOUNTED = MountConfig()
EXT4 = MountConfig(ensure_filesystem=True, filesystem="ext4")
TOLD_OR_NOT = pytest.mark.parametrize("lists_disks", [True, False], ids=["listed", "silent"])


class TestADisk:
    async def test_is_made_written_and_comes_back(self, service: HCSOnQEMU, tmp_path: Path) -> None:
        """A blank VHDX: five requests there and back, and what was written stays on it."""
        path = disks.image(tmp_path / "web.vhdx", "vhdx", size="64M")
        began = len(service.documents)
        async with managed(service) as manager:
            mount = await manager.add_virtual_disk(path, mount=EXT4)
            assert (await mounted_at(service.vm, mount)).filesystem == "ext4"
            await shell(service.vm, f"echo written >{mount.guest_path}/note")
            await mount.release()
            assert verbs(service, began) == [
                "Add",
                "Add MappedVirtualDisk",
                "Remove MappedVirtualDisk",
                "Remove SCSIDevice",
                "Remove",
            ]
            disks.check(path, "vhdx")
            async with await manager.add_virtual_disk(path, mount=EXT4) as again:
                assert await note_in(service.vm, again) == "written\n"

    async def test_is_shared_by_those_who_want_the_same(
        self, service: HCSOnQEMU, tmp_path: Path
    ) -> None:
        """A VHD that is only read has one attachment, one mount, and goes with the last holder."""
        path = image(tmp_path, "manual", OLDEST)
        began = len(service.documents)
        async with managed(service) as manager:
            one, other = await asyncio.gather(
                *(manager.add_virtual_disk(path, read_only=True, mount=MOUNTED) for _ in range(2))
            )
            assert (one.slot, one.guest_path) == (other.slot, other.guest_path)
            assert verbs(service, began) == ["Add", "Add MappedVirtualDisk"]
            info = await mounted_at(service.vm, one)
            assert "ro" in info.options
            assert service.attached[one.slot].disk.read_only
            await one.release()
            assert await note_in(service.vm, other) == "manual"
            await other.release()
        assert len(verbs(service, began)) == 5

    async def test_is_refused_to_who_contradicts(self, service: HCSOnQEMU, tmp_path: Path) -> None:
        """Before the service hears of it."""
        path = image(tmp_path, "data", NEWEST)
        async with managed(service) as manager:
            mount = await manager.add_virtual_disk(path, mount=MOUNTED)
            began = len(service.documents)
            with pytest.raises(DiskConflictError):
                await manager.add_virtual_disk(path, read_only=True, mount=MOUNTED)
            with pytest.raises(DiskConflictError):
                await manager.add_virtual_disk(path, mount=EXT4)
            assert verbs(service, began) == []
            await mount.release()

    async def test_has_partitions(self, service: HCSOnQEMU, tmp_path: Path) -> None:
        """Two mounts of one attachment, each of its own."""
        raw = disks.partitioned(tmp_path / "parts.raw", "gpt", {1: "one", 2: "two"})
        path = disks.converted(raw, tmp_path / "parts.vhdx", NEWEST)
        async with managed(service) as manager:
            mounts = [
                await manager.add_virtual_disk(path, mount=MountConfig(partition=number))
                for number in (1, 2)
            ]
            assert [await note_in(service.vm, mount) for mount in mounts] == ["one", "two"]
            assert mounts[0].slot == mounts[1].slot

    async def test_is_encrypted_scratch(self, service: HCSOnQEMU, tmp_path: Path) -> None:
        """Under a key that nobody has; what was written cannot be read in the image."""
        path = disks.image(tmp_path / "scratch.vhdx", "vhdx", size="64M")
        config = MountConfig(encrypted=True, ensure_filesystem=True, filesystem="ext4")
        async with managed(service) as manager:
            mount = await manager.add_virtual_disk(path, mount=config)
            await shell(service.vm, f"echo not to be seen >{mount.guest_path}/note; sync")
            assert await shell(service.vm, "dmsetup ls --target crypt") != "No devices found\n"
            await mount.release()
        assert b"not to be seen" not in path.read_bytes()

    async def test_is_encrypted_under_a_key(self, service: HCSOnQEMU, tmp_path: Path) -> None:
        """Which opens it again; another one does not, and the guest's own code says so."""
        path = disks.image(tmp_path / "vault.vhdx", "vhdx", size="64M")
        config = MountConfig(
            encrypted=True, ensure_filesystem=True, filesystem="ext4", key=Secret("sesame")
        )
        wrong = MountConfig(encrypted=True, filesystem="ext4", key=Secret("wrong"))
        async with managed(service) as manager:
            async with await manager.add_virtual_disk(path, mount=config) as mount:
                await shell(service.vm, f"echo kept >{mount.guest_path}/note")
            with pytest.raises(BackendError) as caught:
                await manager.add_virtual_disk(path, mount=wrong)
            assert caught.value.code == 0x80310027
            async with await manager.add_virtual_disk(path, mount=config) as mount:
                assert await note_in(service.vm, mount) == "kept\n"

    async def test_is_one_of_many(self, service: HCSOnQEMU, tmp_path: Path) -> None:
        """Side by side on four controllers, VHD and VHDX."""
        paths = [image(tmp_path, f"d{n}", (NEWEST, OLDEST)[n % 2]) for n in range(8)]
        async with managed(service, luns_per_controller=2) as manager:
            mounts = await asyncio.gather(
                *(manager.add_virtual_disk(path, mount=MOUNTED) for path in paths)
            )
            assert {mount.slot for mount in mounts} == {
                Slot(controller, lun) for controller in range(4) for lun in range(2)
            }
            notes = await asyncio.gather(*(note_in(service.vm, mount) for mount in mounts))
            assert notes == [path.stem for path in paths]

    @TOLD_OR_NOT
    async def test_of_the_vm_itself_is_left_alone(
        self, service: HCSOnQEMU, tmp_path: Path, lists_disks: bool
    ) -> None:
        """Whether the service says that its slot is filled, or only refuses it."""
        service.lists_disks = lists_disks
        path = image(tmp_path, "data", NEWEST)
        before = [Slot(TAKEN.controller, lun) for lun in range(TAKEN.lun)]
        async with managed(service, reserved_slots=before) as manager:
            is_known = status_of(manager, TAKEN).state is SlotState.RESERVED
            assert is_known == lists_disks
            async with await manager.add_virtual_disk(path, mount=MOUNTED) as mount:
                assert mount.slot == Slot(TAKEN.controller, TAKEN.lun + 1)
                assert await note_in(service.vm, mount) == "data"
            assert status_of(manager, TAKEN).state is SlotState.RESERVED
        assert "own" in (await look(service.vm)).devices


class TestWhatCannotBe:
    async def test_is_told_with_the_services_code(self, service: HCSOnQEMU, tmp_path: Path) -> None:
        """Of disk and slot; and the slot is free again."""
        missing, corrupt = tmp_path / "missing.vhdx", tmp_path / "corrupt.vhdx"
        corrupt.write_bytes(b"vhdxfile" + bytes(1 << 20))
        busy = image(tmp_path, "busy", NEWEST)
        node = {"driver": "file", "filename": str(busy)}
        await service.vm.query("blockdev-add", {"driver": "vhdx", "node-name": "b", "file": node})
        async with managed(service) as manager:
            for path, code, words in (
                (missing, 0x80070002, "give a path that exists"),
                (corrupt, 0x80070570, "repair it"),
                (busy, 0x80070020, "somebody else has the disk open"),
            ):
                with pytest.raises(BackendError, match=words) as caught:
                    await manager.add_virtual_disk(path, mount=MOUNTED)
                error = caught.value
                assert (error.code, error.slot) == (code, Slot(0, 0))
                assert str(path) in str(error)
                assert used(manager) == []
        await service.vm.query("blockdev-del", {"node-name": "b"})

    async def test_be_mounted_leaves_the_disk_to_its_other_holders(
        self, service: HCSOnQEMU, tmp_path: Path
    ) -> None:
        """The guest's words come through the service."""
        path = image(tmp_path, "data", NEWEST)
        async with managed(service) as manager:
            holder = await manager.add_virtual_disk(path, mount=MOUNTED)
            with pytest.raises(BackendError, match="partition") as caught:
                await manager.add_virtual_disk(path, mount=MountConfig(partition=9))
            assert caught.value.detail
            assert await note_in(service.vm, holder) == "data"


@pytest.mark.root
async def test_a_vm_is_let_in_and_shut_out_again(service: HCSOnQEMU, tmp_path: Path) -> None:
    """By the file's access list, for as long as it has the disk."""
    path = image(tmp_path, "data", NEWEST)

    def access() -> bool:
        return "system.posix_acl_access" in os.listxattr(path)

    async with managed(service) as manager:
        one = await manager.add_virtual_disk(path, vm_id=ID, mount=MOUNTED)
        other = await manager.add_virtual_disk(path, vm_id=ID, mount=MOUNTED)
        assert access()
        await one.release()
        assert access()
        await other.release()
        assert not access()
        with pytest.raises(BackendError, match="no such file"):
            await manager.add_virtual_disk(tmp_path / "no.vhdx", vm_id=ID)


async def test_a_vm_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    """Everything says so with the service's code, nothing is asked to be undone, and it ends."""
    path, other = image(tmp_path, "held", NEWEST), image(tmp_path, "other", OLDEST)
    async with (
        Machine.start(connect=False) as vm,
        HCSOnQEMU.serving(vm) as service,
        managed(service) as manager,
    ):
        mount = await manager.add_virtual_disk(path, vm_id=ID, mount=MOUNTED)
        with pytest.raises(HotlunError, match="still runs"):
            await manager.forget()
        vm.kill()
        await vm.wait()
        for call in (manager.add_virtual_disk(other), mount.release(), manager.reconcile()):
            with pytest.raises(VMGoneError) as caught:
                await call
            assert caught.value.code == 0x80370110
        await manager.forget()
        assert (manager.mounts, used(manager)) == ((), [])
        assert "system.posix_acl_access" not in os.listxattr(path)
        assert service.violations == []
