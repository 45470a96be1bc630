"""The worst trap of hot-plugging: a slot's new disk, and the guest reads the old one's bytes.

A device that leaves QEMU while the guest's kernel still has it, and another at its
LUN: most guest devices stay the old ones, cached pages included. So a release has
to take the guest's device first, see it gone, and only then QEMU's; and where that
was not done, the guest's agent has to find out.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from support.guest_shell import shell

from hotlun import BackendError, Manager, MountConfig

if TYPE_CHECKING:
    from pathlib import Path

    from hotlun import Attachment, Mount
    from hotlun.backends.bridge import BridgeGuestBackend
    from hotlun.vm import Machine

pytestmark = pytest.mark.asyncio(loop_scope="module")

DISKS = 32
ROUNDS = 10
SECTOR = 512
LINK = MountConfig(block_device=True)


def made(path: Path, words: str, sectors: int) -> Path:
    """A raw disk that has its name at the beginning and at the end."""
    sector = words.encode().ljust(SECTOR)
    with path.open("wb") as file:
        file.write(sector)
        file.truncate((sectors - 1) * SECTOR)
        file.seek(0, 2)
        file.write(sector)
    return path


async def read(vm: Machine, mounts: list[Mount]) -> list[list[str]]:
    """Of each disk, by its path in the guest: first sector, last sector, size in sectors."""
    script = (
        "import os, sys\n"
        "for path in sys.argv[1:]:\n"
        "    disk = os.open(path, os.O_RDONLY)\n"
        "    size = os.lseek(disk, 0, os.SEEK_END)\n"
        f"    ends = [os.pread(disk, {SECTOR}, at).decode() for at in (0, size - {SECTOR})]\n"
        f"    print(*ends, size // {SECTOR})\n"
    )
    paths = " ".join(str(mount.guest_path) for mount in mounts)
    said = await shell(vm, f"python3 -IS - {paths} <<'END'\n{script}END")
    return [line.split() for line in said.splitlines()]


async def test_a_slots_new_disk_is_the_one_that_is_read(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """32 releases at once, 32 adds at once on the same slots, ten times: 32 of 32 are the new."""
    mounts: list[Mount] = []
    slots = None
    for turn in range(ROUNDS + 1):  # before the first, there is nothing to release
        wanted = [[f"{turn}-{n}", f"{turn}-{n}", f"{2048 + 64 * turn + n}"] for n in range(DISKS)]
        paths = [made(tmp_path / f"{w[0]}.raw", w[0], int(w[2])) for w in wanted]
        await asyncio.gather(*(mount.release() for mount in mounts))
        mounts = list(
            await asyncio.gather(*(manager.add_virtual_disk(p, mount=LINK) for p in paths))
        )
        assert slots in (None, {mount.slot for mount in mounts})
        slots = {mount.slot for mount in mounts}
        assert await read(shared_vm, mounts) == wanted


async def test_newcomers_that_do_not_wait_for_the_releases(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """Releases and adds all at once: each add takes what is free at its moment, and is right."""
    mounts: list[Mount] = []
    for turn in range(2):
        wanted = [[f"{turn}-{n}", f"{turn}-{n}", f"{2048 + 64 * turn + n}"] for n in range(DISKS)]
        paths = [made(tmp_path / f"{w[0]}.raw", w[0], int(w[2])) for w in wanted]
        releases = [asyncio.create_task(mount.release()) for mount in mounts]
        mounts = list(
            await asyncio.gather(*(manager.add_virtual_disk(p, mount=LINK) for p in paths))
        )
        await asyncio.gather(*releases)
        assert await read(shared_vm, mounts) == wanted


class DeafGuest:
    """A guest that is not told to let go of its devices, unless it `hears`."""

    def __init__(self, guest: BridgeGuestBackend) -> None:
        self._guest = guest
        self.hears = False
        self.os_type = guest.os_type
        self.controllers = guest.controllers
        self.check = guest.check
        self.mount = guest.mount
        self.unmount = guest.unmount

    async def unplug(self, attachment: Attachment) -> None:
        if self.hears:
            await self._guest.unplug(attachment)


async def serials(vm: Machine) -> set[str]:
    """What the guest's kernel takes its disks for."""
    pages = await shell(vm, r"cat /sys/bus/scsi/devices/*:*/vpd_pg80 | tr -cs a-z0-9 '\n'")
    return set(pages.split())


async def all_known(vm: Machine) -> set[str]:
    """The serials of all the disks, once the guest's kernel has found them."""
    while len(known := await serials(vm)) < DISKS:
        await asyncio.sleep(0.1)
    return known


async def replaced(
    vm: Machine, manager: Manager, old: list[Mount], paths: list[Path]
) -> list[Mount]:
    """Attach other disks in place of the old ones, so fast that the guest sees nothing of it.

    It is stopped, and virtio-scsi has eight buffers for the events that tell of it.
    """
    before = await all_known(vm)
    await vm.query("stop")
    await asyncio.gather(*(mount.release() for mount in old))
    new = list(await asyncio.gather(*(manager.add_virtual_disk(path) for path in paths)))
    await vm.query("cont")
    assert {mount.slot for mount in new} == {mount.slot for mount in old}
    assert len(before & await serials(vm)) > DISKS // 2
    return new


UNBIND = "cd /sys/bus/scsi/drivers/sd; for disk in *:0:0:*; do echo $disk >unbind; done"


@pytest.mark.parametrize("before", ["", UNBIND], ids=["with a driver", "without"])
async def test_stale_devices_are_found_out(shared_vm: Machine, tmp_path: Path, before: str) -> None:
    """The guest has most of 32 disks for the ones before them; all 32 mounts are right.

    Also if an agent that was killed had begun to let go of those.
    """
    guest = DeafGuest(shared_vm.guest)
    async with Manager(shared_vm.host, guest) as manager:
        first = [made(tmp_path / f"a{n}.raw", f"a{n}", 2048) for n in range(DISKS)]
        old = list(await asyncio.gather(*(manager.add_virtual_disk(path) for path in first)))
        wanted = [[f"b{n}", f"b{n}", str(2048 + n)] for n in range(DISKS)]
        second = [made(tmp_path / f"{w[0]}.raw", w[0], int(w[2])) for w in wanted]
        await all_known(shared_vm)
        await shell(shared_vm, before)
        await replaced(shared_vm, manager, old, second)
        mounts = await asyncio.gather(*(manager.add_virtual_disk(p, mount=LINK) for p in second))
        assert await read(shared_vm, list(mounts)) == wanted
        guest.hears = True


async def test_a_stale_device_in_use_is_not_mounted(shared_vm: Machine, tmp_path: Path) -> None:
    """Nor let go, as what is on it has its disk for the old one; who that is, is said."""
    guest = DeafGuest(shared_vm.guest)
    async with Manager(shared_vm.host, guest) as manager:
        first = [made(tmp_path / f"a{n}.raw", f"a{n}", 2048) for n in range(DISKS)]
        old = list(await asyncio.gather(*(manager.add_virtual_disk(path) for path in first)))
        await all_known(shared_vm)
        slot = max(mount.slot for mount in old)
        node = f"/dev/$(ls /sys/bus/scsi/devices/*:0:0:{slot.lun}/block)"
        await shell(shared_vm, f'dmsetup create vault --table "0 2048 linear {node} 0"')
        second = [made(tmp_path / f"b{n}.raw", f"b{n}", 2048) for n in range(DISKS)]
        new = await replaced(shared_vm, manager, old, second)
        path = next(p for p, mount in zip(second, new, strict=True) if mount.slot == slot)
        words = r"its serial is '\w+', not '\w+'.* in use: sd\w+ is part of dm-\d+ \(vault\)"
        with pytest.raises(BackendError, match=words):
            await manager.add_virtual_disk(path, mount=LINK)
        await shell(shared_vm, "dmsetup remove vault")
        mount = await manager.add_virtual_disk(path, mount=LINK)
        assert (await read(shared_vm, [mount]))[0][0] == path.stem
        guest.hears = True
