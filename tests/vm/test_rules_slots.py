"""Which slot a disk gets, and that it is this place in QEMU and in the guest."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
from support import disks
from support.guest_shell import note_in, shell
from support.machine import look

from hotlun import Manager, MountConfig, NoAvailableLocationError, Slot, SlotState
from hotlun.vm import Machine
from hotlun.vm.errors import MachineError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.asyncio(loop_scope="module")

MOUNTED = MountConfig()


async def test_lowest_first_over_all_controllers(shared_vm: Machine, tmp_path: Path) -> None:
    """Our controller n is the n-th PCI device, for QEMU and guest; a free slot is taken again."""
    paths = [disks.ext4(tmp_path / f"{number}.raw", str(number)) for number in range(10)]
    async with Manager(shared_vm.host, shared_vm.guest, luns_per_controller=2) as manager:
        mounts = [await manager.add_virtual_disk(path, mount=MOUNTED) for path in paths[:8]]
        places = [(controller, lun) for controller in range(4) for lun in range(2)]
        assert [(mount.controller, mount.lun) for mount in mounts] == places
        full = await look(shared_vm)
        assert [(device.controller, device.lun) for device in full.scsi] == places
        for number, mount in enumerate(mounts):
            assert await note_in(shared_vm, mount) == str(number)
            device = full.mount_at(str(mount.guest_path))
            assert device is not None
            assert device.device.removeprefix("/dev/") == full.scsi[number].block
        with pytest.raises(NoAvailableLocationError, match="release a disk"):
            await manager.add_virtual_disk(paths[8], mount=MOUNTED)
        assert await look(shared_vm) == full
        await mounts[5].release()
        await mounts[2].release()
        for number, place in ((8, (1, 0)), (9, (2, 1))):
            again = await manager.add_virtual_disk(paths[number], mount=MOUNTED)
            assert (again.controller, again.lun) == place
            assert await note_in(shared_vm, again) == str(number)


async def test_luns_up_to_the_last(shared_vm: Machine, manager: Manager, tmp_path: Path) -> None:
    """LUN 63 is seen although nothing is between it and LUN 0."""
    reserved = [Slot(0, lun) for lun in range(1, 63)]
    paths = [disks.ext4(tmp_path / f"{number}.raw", str(number)) for number in range(2)]
    async with Manager(shared_vm.host, shared_vm.guest, reserved_slots=reserved) as manager:
        mounts = [await manager.add_virtual_disk(path, mount=MOUNTED) for path in paths]
        assert [mount.slot for mount in mounts] == [Slot(0, 0), Slot(0, 63)]
        assert [await note_in(shared_vm, mount) for mount in mounts] == ["0", "1"]


async def test_many_disks_at_once_on_all_controllers(shared_vm: Machine, tmp_path: Path) -> None:
    """64 adds side by side: each mount has its own disk's file; 64 releases leave nothing."""
    paths = [disks.ext4(tmp_path / f"{n}.raw", str(n), 2 * disks.MIB) for n in range(64)]
    async with Manager(shared_vm.host, shared_vm.guest, luns_per_controller=16) as manager:
        mounts = await asyncio.gather(
            *(manager.add_virtual_disk(path, mount=MOUNTED) for path in paths)
        )
        seen = await look(shared_vm)
        assert len(seen.scsi) == 64
        assert {device.controller for device in seen.scsi} == {0, 1, 2, 3}
        notes = " ".join(f"{mount.guest_path}/note" for mount in mounts)
        said = await shell(shared_vm, f"for note in {notes}; do cat $note; echo; done")
        assert said.split() == [str(number) for number in range(64)]
        serials = "cat /sys/bus/scsi/devices/*:0:0:*/vpd_pg80 | tr -d '\\000'"
        said = await shell(shared_vm, serials)
        assert all(mount.serial in said for mount in mounts)
        await asyncio.gather(*(mount.release() for mount in mounts))
        assert {status.state for status in manager.slots()} == {SlotState.FREE}


async def test_a_slot_that_turns_out_taken_is_left_alone(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """Somebody else's device, plugged after the Manager was entered: the next slot is used."""
    await shared_vm.query("blockdev-add", {"driver": "null-co", "node-name": "other", "size": 512})
    device = {"driver": "scsi-hd", "id": "other", "drive": "other", "bus": "scsi0.0", "lun": 0}
    await shared_vm.query("device_add", device)
    mount = await manager.add_virtual_disk(disks.ext4(tmp_path / "disk.raw", "mine"), mount=MOUNTED)
    assert mount.slot == Slot(0, 1)
    assert await note_in(shared_vm, mount) == "mine"
    assert manager.slots()[0].state is SlotState.RESERVED
    await manager.release_all()
    assert "other" in (await look(shared_vm)).devices
    await shell(shared_vm, "echo 1 | tee /sys/bus/scsi/devices/*:0:0:0/delete")
    await shared_vm.query("device_del", {"id": "other"})
    async with asyncio.timeout(20):
        while "other" in (await look(shared_vm)).nodes:  # in use for a moment after its device
            with contextlib.suppress(MachineError):
                await shared_vm.query("blockdev-del", {"node-name": "other"})


async def test_disks_of_the_vms_own_are_neither_used_nor_touched(tmp_path: Path) -> None:
    """A boot disk on controller 0 and one on 1, and what the caller reserves: all stepped over."""
    boot = [disks.ext4(tmp_path / f"boot{number}.raw", f"boot{number}") for number in range(2)]
    before = [disks.digest(path) for path in boot]
    arguments: list[str] = []
    for number, (path, place) in enumerate(
        zip(boot, ("scsi0.0,lun=0", "scsi1.0,lun=1"), strict=True)
    ):
        arguments += [
            *("-blockdev", f"driver=file,node-name=boot{number},filename={path}"),
            *("-device", f"scsi-hd,id=boot{number},bus={place},drive=boot{number}"),
        ]
    async with Machine.start(extra_arguments=arguments) as vm:
        empty = await look(vm)
        own = {Slot(0, 0), Slot(1, 1)}
        assert await vm.host.occupied() == own
        async with Manager(
            vm.host, vm.guest, luns_per_controller=3, reserved_slots=[Slot(0, 2)]
        ) as manager:
            reserved = {s.slot for s in manager.slots() if s.state is SlotState.RESERVED}
            assert reserved == own | {Slot(0, 2)}
            paths = [disks.ext4(tmp_path / f"{number}.raw", str(number)) for number in range(3)]
            mounts = [await manager.add_virtual_disk(path, mount=MOUNTED) for path in paths]
            assert [mount.slot for mount in mounts] == [Slot(0, 1), Slot(1, 0), Slot(1, 2)]
            assert [await note_in(vm, mount) for mount in mounts] == ["0", "1", "2"]
        after = await look(vm)
        assert (after.devices, after.scsi) == (empty.devices, empty.scsi)
    assert [disks.digest(path) for path in boot] == before
