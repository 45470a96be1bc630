"""A guest that is not as the host left it: disks swapped unseen, devices held open, paths confused.

The requests go to the agent without a Manager, which would not make most of them.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from support import disks
from support.guest_shell import shell

from hotlun import BackendError, Manager, MountConfig, Secret, Slot
from hotlun.model import Attachment, Disk, DiskIdentity, DiskKind, GuestMount, ImageFormat

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hotlun.vm import Machine

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCRATCH = MountConfig(filesystem="ext4", ensure_filesystem=True, encrypted=True)
LINK = MountConfig(block_device=True)


def attachment(path: Path, serial: str, *, read_only: bool = False) -> Attachment:
    """At slot 0:0, always: slots that are used again are what is tested here."""
    disk = Disk(str(path), DiskKind.VIRTUAL_DISK, read_only=read_only, format=ImageFormat.RAW)
    return Attachment(Slot(0, 0), disk, serial)


@pytest_asyncio.fixture(loop_scope="module")
async def one(shared_vm: Machine, tmp_path: Path) -> AsyncIterator[Attachment]:
    """A blank disk, in the VM; taken away whatever the test has left."""
    there = attachment(disks.blank(tmp_path / "one.raw"), "one")
    await shared_vm.host.attach(there)
    yield there
    await shared_vm.guest.unplug(there)
    await shared_vm.host.detach(there)


async def swapped(vm: Machine, old: Attachment, path: Path, serial: str) -> Attachment:
    """Another disk in the slot, of which the guest was told nothing beforehand."""
    await vm.host.detach(old)
    await shell(vm, "while [ -e /sys/bus/scsi/devices/0:0:0:0 ]; do sleep 0.05; done")
    new = attachment(disks.blank(path), serial)
    await vm.host.attach(new)
    await shell(vm, "until ls /sys/bus/scsi/devices/0:0:0:0/block; do sleep 0.05; done")
    return new


async def mapped(vm: Machine) -> str:
    """The names of the guest's mapped devices."""
    return await shell(vm, "dmsetup ls | sed -n 's,\\(hotlun-.*\\)\t.*,\\1,p'")


async def test_what_was_mounted_from_a_disk_that_is_gone_is_not_the_new_one(
    shared_vm: Machine, tmp_path: Path
) -> None:
    """A repeated request is not taken for done, and is no success."""
    old = attachment(disks.blank(tmp_path / "old.raw"), "old")
    await shared_vm.host.attach(old)
    await shared_vm.guest.mount(GuestMount(old, "/run/d", SCRATCH))
    new = await swapped(shared_vm, old, tmp_path / "new.raw", "new")
    with pytest.raises(BackendError, match="is in use"):
        await shared_vm.guest.mount(GuestMount(new, "/run/d", SCRATCH))
    await shared_vm.guest.unmount(GuestMount(new, "/run/d", SCRATCH))
    assert await mapped(shared_vm) == ""
    await shared_vm.guest.mount(GuestMount(new, "/run/d", SCRATCH))
    await shell(shared_vm, "echo new > /run/d/note && sync /run/d/note")
    await shared_vm.guest.unmount(GuestMount(new, "/run/d", SCRATCH))
    await shared_vm.guest.unplug(new)
    await shared_vm.host.detach(new)


async def test_a_link_is_to_the_disk_that_is_meant(shared_vm: Machine, one: Attachment) -> None:
    """Also when there is one at the path already."""
    told = GuestMount(one, "/run/link", LINK, DiskIdentity("one", 32 * disks.MIB))
    await shared_vm.guest.mount(told)
    await shared_vm.guest.mount(told)
    for identity in (DiskIdentity("another"), DiskIdentity("one", 99 * disks.MIB)):
        with pytest.raises(BackendError, match="not the disk that is meant"):
            await shared_vm.guest.mount(replace(told, identity=identity))
    await shared_vm.guest.unmount(told)


async def test_a_mount_that_failed_does_not_hold_the_disk_for_ever(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """Somebody has the mapped device open when it is to be closed, and lets go only later."""
    path = disks.blank(tmp_path / "disk.raw")
    # An mkfs that leaves a process behind that has its device open, and fails.
    await shell(
        shared_vm,
        "mkdir -p /usr/local/sbin && cat > /usr/local/sbin/mkfs.ext4 <<'END'\n"
        "#!/bin/sh\n"
        "for node; do :; done\n"
        'setsid sh -c "exec 9<$node; sleep 8" </dev/null >/dev/null 2>&1 &\n'
        "echo not today; exit 1\n"
        "END\nchmod +x /usr/local/sbin/mkfs.ext4",
    )
    try:
        with pytest.raises(BackendError, match="not today"):
            await manager.add_virtual_disk(path, mount=SCRATCH)
    finally:
        await shell(shared_vm, "rm /usr/local/sbin/mkfs.ext4")
    async with asyncio.timeout(60):
        while True:
            try:
                await manager.release_all()
                break
            except ExceptionGroup:
                await asyncio.sleep(0.5)
    assert await mapped(shared_vm) == ""
    mount = await manager.add_virtual_disk(path, mount=SCRATCH)
    await mount.release()


async def test_a_path_that_held_nothing_closes_nothing(shared_vm: Machine, one: Attachment) -> None:
    """To unmount what is not there is success, and what is mounted elsewhere stays."""
    await shared_vm.guest.mount(GuestMount(one, "/run/here", SCRATCH))
    await shell(shared_vm, "echo kept > /run/here/note")
    await shared_vm.guest.unmount(GuestMount(one, "/run/elsewhere", SCRATCH))
    assert await shell(shared_vm, "cat /run/here/note") == "kept\n"
    await shared_vm.guest.unmount(GuestMount(one, "/run/here", SCRATCH))
    assert await mapped(shared_vm) == ""


async def test_what_somebody_unmounted_by_hand_is_closed_all_the_same(
    shared_vm: Machine, one: Attachment
) -> None:
    """By the unmount, or by the unplug if none is asked for."""
    mount = GuestMount(one, "/run/hand", SCRATCH)
    await shared_vm.guest.mount(mount)
    await shell(shared_vm, "umount /run/hand")
    assert await mapped(shared_vm) != ""
    await shared_vm.guest.unmount(mount)
    assert await mapped(shared_vm) == ""
    await shared_vm.guest.mount(mount)
    await shell(shared_vm, "umount /run/hand && rmdir /run/hand")


async def test_a_volume_that_was_never_finished_is_made_anew(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """The guest was reset between the header and its first key: no key could ever open it."""
    path = disks.blank(tmp_path / "disk.raw", 48 * disks.MIB)
    keyed = MountConfig(
        filesystem="ext4", ensure_filesystem=True, encrypted=True, key=Secret("mine")
    )
    link = await manager.add_virtual_disk(path, mount=LINK, guest_path="/run/raw")
    await shell(
        shared_vm,
        "printf x | cryptsetup luksFormat --batch-mode --disable-locks --type luks2 --key-file - "
        "--subsystem 'hotlun: unfinished' --pbkdf pbkdf2 --pbkdf-force-iterations 1000 /run/raw "
        "&& printf x | cryptsetup luksKillSlot --batch-mode --disable-locks /run/raw 0",
    )
    await link.release()
    with pytest.raises(BackendError, match="unfinished LUKS volume"):
        await manager.add_virtual_disk(path, mount=MountConfig(encrypted=True, key=Secret("mine")))
    mount = await manager.add_virtual_disk(path, mount=keyed)
    await shell(shared_vm, f"echo kept > {mount.guest_path}/note")
    await mount.release()
    mount = await manager.add_virtual_disk(path, mount=keyed)
    assert await shell(shared_vm, f"cat {mount.guest_path}/note") == "kept\n"
