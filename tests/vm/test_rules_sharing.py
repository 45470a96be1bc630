"""The same disk is attached once and the same mount made once, counted in the guest and in QEMU."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest
from support import disks
from support.guest_shell import block_name, mounted_at, note_in, shell
from support.machine import look

from hotlun import BackendError, DiskConflictError, Manager, MountConfig, Slot, SlotState
from hotlun.vm import Machine

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.asyncio(loop_scope="module")

MOUNTED = MountConfig()
FORMATTED = MountConfig(filesystem="ext4", ensure_filesystem=True)


async def test_two_handles_are_one_device(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """One device, one mount; it stays for the second when the first is released."""
    path = disks.ext4(tmp_path / "disk.raw", "shared")
    one = await manager.add_virtual_disk(path, mount=MOUNTED)
    alone = await look(shared_vm)
    two = await manager.add_virtual_disk(path, mount=MOUNTED, guest_path="/mnt/elsewhere")
    assert await look(shared_vm) == alone
    assert two.guest_path == one.guest_path
    await one.release()
    assert await look(shared_vm) == alone
    assert await note_in(shared_vm, two) == "shared"
    await two.release()
    seen = await look(shared_vm)
    assert seen.scsi == ()
    assert seen.mount_at(str(two.guest_path)) is None


async def test_racing_adds_are_one_device(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """Ten at once, formatting included: one node, one device, one mount."""
    path = disks.blank(tmp_path / "disk.raw")
    mounts = await asyncio.gather(
        *(manager.add_virtual_disk(path, mount=FORMATTED) for _ in range(10))
    )
    seen = await look(shared_vm)
    assert len(seen.scsi) == 1
    device = f"/dev/{seen.scsi[0].block}"
    assert [m.path for m in seen.mounts if m.device == device] == [mounts[0].guest_path]
    assert len({mount.guest_path for mount in mounts}) == 1


async def test_other_names_of_a_file_are_the_same_disk(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """A hard link and a symbolic link lead to the device that is there."""
    path = disks.ext4(tmp_path / "disk.raw")
    hard, soft = tmp_path / "hard.raw", tmp_path / "soft.img"
    os.link(path, hard)
    soft.symlink_to(path)
    mounts = [await manager.add_virtual_disk(p, mount=MOUNTED) for p in (path, hard, soft)]
    assert {mount.slot for mount in mounts} == {Slot(0, 0)}
    assert len((await look(shared_vm)).scsi) == 1


async def test_another_config_is_another_mount_of_the_same_device(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """Two mounts with options of their own; each goes with its own handle."""
    path = disks.ext4(tmp_path / "disk.raw", "both")
    plain = await manager.add_virtual_disk(path, mount=MOUNTED)
    other = MountConfig(options=["noatime", "ro"])
    second = await manager.add_virtual_disk(path, mount=other)
    assert second.slot == plain.slot
    one, two = await mounted_at(shared_vm, plain), await mounted_at(shared_vm, second)
    assert one.device == two.device == f"/dev/{await block_name(shared_vm, plain)}"
    assert "rw" in one.options
    assert {"ro", "noatime"} <= two.options
    await shell(shared_vm, f"echo new > {plain.guest_path}/note")
    assert await note_in(shared_vm, second) == "new\n"
    await plain.release()
    seen = await look(shared_vm)
    assert seen.mount_at(str(plain.guest_path)) is None
    assert await note_in(shared_vm, second) == "new\n"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"read_only": True}),
        ({"read_only": True}, {}),
        ({}, {"format": "qcow2"}),
        ({"mount": MOUNTED}, {"mount": FORMATTED}),
        ({"mount": FORMATTED}, {"mount": MountConfig(partition=1)}),
    ],
    ids=["read-only", "writable", "format", "would format", "formatted"],
)
async def test_contradictions_are_refused_before_anything_is_done(
    shared_vm: Machine,
    manager: Manager,
    tmp_path: Path,
    first: dict[str, object],
    second: dict[str, object],
) -> None:
    """A disk in use in another way: the error names disk and slot, guest and QEMU see nothing."""
    path = disks.ext4(tmp_path / "disk.raw")
    await manager.add_virtual_disk(path, **first)  # type: ignore[arg-type]
    before = await look(shared_vm)
    with pytest.raises(DiskConflictError) as caught:
        await manager.add_virtual_disk(path, **second)  # type: ignore[arg-type]
    assert str(path) in str(caught.value)
    assert caught.value.slot == Slot(0, 0)
    assert await look(shared_vm) == before


async def test_a_disk_that_another_manager_has_is_refused(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """The file is locked, and the refusal says so. Read-only on both sides, it is shared."""
    path = disks.ext4(tmp_path / "disk.raw", "mine")
    mount = await manager.add_virtual_disk(path, mount=MOUNTED)
    before = await look(shared_vm)
    async with Manager(shared_vm.host, shared_vm.guest) as second:
        for read_only in (False, True):
            with pytest.raises(BackendError, match="another user has the disk open") as caught:
                await second.add_virtual_disk(path, read_only=read_only, mount=MOUNTED)
            assert str(path) in str(caught.value)
            assert "lock" in caught.value.detail
        assert await look(shared_vm) == before
        assert second.slots()[0].state is SlotState.RESERVED
        assert {status.state for status in second.slots()[1:]} == {SlotState.FREE}
        await mount.release()
        readers = [
            await each.add_virtual_disk(
                path, read_only=True, mount=MOUNTED, guest_path=f"/mnt/{number}"
            )
            for number, each in enumerate((manager, second))
        ]
        # The second Manager saw slot 0:0 taken when it was entered.
        assert [reader.slot for reader in readers] == [Slot(0, 0), Slot(0, 1)]
        assert [await note_in(shared_vm, reader) for reader in readers] == ["mine", "mine"]


async def test_a_disk_that_another_vm_has_is_refused(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """A writable disk is one VM's; when that one is done with it, the other gets it."""
    path = disks.ext4(tmp_path / "disk.raw", "mine")
    async with Machine.start() as vm, Manager(vm.host, vm.guest) as elsewhere:
        mount = await elsewhere.add_virtual_disk(path, mount=MOUNTED)
        before = await look(shared_vm)
        with pytest.raises(BackendError, match="another user has the disk open") as caught:
            await manager.add_virtual_disk(path, mount=MOUNTED)
        assert (caught.value.slot, str(caught.value.disk)) == (Slot(0, 0), str(path))
        assert await look(shared_vm) == before
        assert {status.state for status in manager.slots()} == {SlotState.FREE}
        await shell(vm, f"echo theirs > {mount.guest_path}/note")
        await mount.release()
        assert await note_in(shared_vm, await manager.add_virtual_disk(path, mount=MOUNTED)) == (
            "theirs\n"
        )


async def test_an_add_that_meets_a_teardown_attaches_afresh(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """Released and asked for at once, again and again: a live mount, and what was written."""
    path = disks.ext4(tmp_path / "disk.raw")
    mount = await manager.add_virtual_disk(path, mount=MOUNTED)
    serials = {mount.serial}
    for turn in range(6):
        await shell(shared_vm, f"echo {turn} > {mount.guest_path}/note")
        release = asyncio.create_task(mount.release())
        # From just begun to nearly over.
        await asyncio.sleep(turn * 0.015)
        mount = await manager.add_virtual_disk(path, mount=MOUNTED)
        await release
        serials.add(mount.serial)
        assert await note_in(shared_vm, mount) == f"{turn}\n"
        assert len((await look(shared_vm)).scsi) == 1
    assert len(serials) > 1
