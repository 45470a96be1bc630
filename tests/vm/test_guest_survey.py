"""A real guest is asked what it has: every kind of mount, what was undone by hand, what was pulled.

The requests go to the agent without a Manager, which would put things right meanwhile.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import pytest
from support import disks, verified
from support.guest_shell import shell

from hotlun import MountConfig, Secret, Slot
from hotlun.backends import base, requests
from hotlun.model import Attachment, Disk, DiskKind, GuestMount, GuestSurvey, ImageFormat, Verity

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hotlun.vm import Machine

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "/run/surveyed"
EXT4 = MountConfig(filesystem="ext4")
SCRATCH = MountConfig(filesystem="ext4", ensure_filesystem=True, encrypted=True)
NOTHING = GuestSurvey()


class Kind(NamedTuple):
    """A kind of guest mount, and an image for it."""

    config: MountConfig
    make: Callable[[Path], object]
    read_only: bool = False


def kinds(path: Path) -> dict[str, Kind]:
    """Every way in which a disk can be at a path."""
    tree = verified.made(path, "erofs")
    proved = Verity(tree.root_hash)

    def keep(path: Path) -> None:
        assert path.exists()

    return {
        "ext4": Kind(EXT4, disks.ext4),
        "btrfs": Kind(
            MountConfig(filesystem="btrfs", ensure_filesystem=True),
            lambda path: disks.blank(path, 256 * disks.MIB),
        ),
        "partition": Kind(
            MountConfig(filesystem="ext4", partition=2),
            lambda path: disks.partitioned(path, "gpt", {1: "first", 2: "second"}),
        ),
        "link": Kind(MountConfig(block_device=True), disks.blank),
        "link to a partition": Kind(
            MountConfig(block_device=True, partition=1),
            lambda path: disks.partitioned(path, "dos", {1: "first"}),
        ),
        "ephemeral": Kind(SCRATCH, disks.blank),
        "luks": Kind(
            MountConfig(
                filesystem="ext4", ensure_filesystem=True, encrypted=True, key=Secret("mine")
            ),
            lambda path: disks.blank(path, 64 * disks.MIB),
        ),
        "verity": Kind(MountConfig(verity=proved), keep, read_only=True),
        "link to verity": Kind(MountConfig(block_device=True, verity=proved), keep, read_only=True),
    }


KINDS = (
    *("ext4", "btrfs", "partition", "link", "link to a partition"),
    *("ephemeral", "luks", "verity", "link to verity"),
)


def attachment(
    path: Path, serial: str, *, slot: Slot | None = None, read_only: bool = False
) -> Attachment:
    disk = Disk(str(path), DiskKind.VIRTUAL_DISK, read_only=read_only, format=ImageFormat.RAW)
    return Attachment(slot or Slot(0, 0), disk, serial)


async def ask(vm: Machine, *mounts: GuestMount, also: tuple[Attachment, ...] = ()) -> GuestSurvey:
    """Of these mounts, their disks and others."""
    attachments = {mount.attachment for mount in mounts} | {*also}
    found = await base.guest_survey(vm.guest, attachments, mounts)
    assert found is not None
    return found


def there(*mounts: GuestMount) -> GuestSurvey:
    return GuestSurvey(frozenset(mount.attachment.serial for mount in mounts), frozenset(mounts))


def only_devices(*attachments: Attachment) -> GuestSurvey:
    return GuestSurvey(frozenset(one.serial for one in attachments))


async def let_go(vm: Machine, *mounts: GuestMount) -> None:
    for mount in mounts:
        await vm.guest.unmount(mount)
        await vm.guest.unplug(mount.attachment)
        await vm.host.detach(mount.attachment)


async def pulled(vm: Machine, one: Attachment) -> None:
    """The disk is taken out at the monitor, and the guest was not told to let go."""
    await vm.query("device_del", {"id": f"hotlun-{one.serial}"})
    address = f"/sys/bus/scsi/devices/0:0:{one.slot.controller}:{one.slot.lun}"
    await shell(vm, f"while [ -e {address} ]; do sleep 0.05; done")


@pytest.mark.parametrize("name", KINDS)
async def test_each_kind_of_mount(shared_vm: Machine, tmp_path: Path, name: str) -> None:
    """It is not there, then there, then undone by hand and not there, and its device is all along.

    With another root hash, partition, kind or path it is another mount, which there is not.
    """
    vm, path = shared_vm, tmp_path / "disk.raw"
    kind = kinds(path)[name]
    kind.make(path)
    one = attachment(path, "kind", read_only=kind.read_only)
    mount = GuestMount(one, PATH, kind.config)
    assert await ask(vm, mount) == NOTHING
    await vm.host.attach(one)
    await vm.guest.mount(GuestMount(one, PATH, kind.config, base.identity(vm.host, one)))
    assert await ask(vm, mount) == there(mount)
    configs = (
        EXT4,
        SCRATCH,
        MountConfig(block_device=True),
        MountConfig(partition=3),
        MountConfig(verity=Verity("ab" * 32)),
    )
    others = [GuestMount(one, "/run/elsewhere", kind.config)]
    others += [GuestMount(one, PATH, config) for config in configs]
    asked = requests.mount_query(mount)  # a btrfs is asked for as an ext4 is
    others = [other for other in others if requests.mount_query(other) != asked]
    assert len(others) >= 5
    assert await ask(vm, mount, *others) == there(mount)
    by_hand = "rm" if kind.config.block_device else "umount"
    await shell(vm, f"{by_hand} {PATH}")
    assert await ask(vm, mount) == only_devices(one)
    await vm.guest.unmount(mount)
    await vm.guest.unplug(one)
    assert await ask(vm, mount) == NOTHING
    await vm.host.detach(one)


async def test_what_is_out_of_sight_is_not_there(shared_vm: Machine, tmp_path: Path) -> None:
    """Under what somebody has mounted on it; and there again when that is gone."""
    await shell(shared_vm, "ln -s /run /run/link")
    one = attachment(disks.ext4(tmp_path / "disk.raw"), "covered")
    mount = GuestMount(one, "/run/link/covered", EXT4)
    await shared_vm.host.attach(one)
    await shared_vm.guest.mount(mount)
    assert await ask(shared_vm, mount) == there(mount)
    await shell(shared_vm, "mount -t tmpfs none /run/covered")
    assert await ask(shared_vm, mount) == only_devices(one)
    await shell(shared_vm, "umount /run/covered")
    assert await ask(shared_vm, mount) == there(mount)
    await let_go(shared_vm, mount)
    await shell(shared_vm, "rm /run/link")


@pytest.mark.parametrize("config", [EXT4, SCRATCH, MountConfig(block_device=True)], ids=str)
async def test_a_disk_that_was_pulled(
    shared_vm: Machine, tmp_path: Path, config: MountConfig
) -> None:
    """Its device is gone and so is its mount, whatever mountinfo says; what comes to its slot
    is another disk, at whose path nothing is."""
    one = attachment(disks.ext4(tmp_path / "one.raw", size=32 * disks.MIB), "pulled")
    mount = GuestMount(one, PATH, config)
    await shared_vm.host.attach(one)
    await shared_vm.guest.mount(mount)
    assert await ask(shared_vm, mount) == there(mount)
    await pulled(shared_vm, one)
    await shared_vm.host.detach(one)
    if not config.block_device:
        assert PATH in await shell(shared_vm, "cat /proc/self/mountinfo")
    assert await ask(shared_vm, mount) == NOTHING
    other = attachment(disks.ext4(tmp_path / "other.raw", size=32 * disks.MIB), "other")
    others = GuestMount(other, PATH, config)
    await shared_vm.host.attach(other)
    await shell(shared_vm, "until ls /sys/bus/scsi/devices/0:0:0:0/block; do sleep 0.05; done")
    found = await ask(shared_vm, mount, others)
    if config.block_device:  # the number was free, and the link leads to the name
        assert found.devices == {"other"}
        assert mount not in found.mounts
    else:
        assert found == only_devices(other)
    await shared_vm.guest.unmount(others)
    assert await ask(shared_vm, mount, others) == only_devices(other)
    await let_go(shared_vm, others)


async def test_a_busy_disk_is_answered_for_at_once(shared_vm: Machine, tmp_path: Path) -> None:
    """While a filesystem is made on it: its device is there, its mount not yet, and it says so."""
    one = attachment(disks.blank(tmp_path / "disk.raw"), "busy")
    mount = GuestMount(one, PATH, MountConfig(filesystem="ext4", ensure_filesystem=True))
    await shell(
        shared_vm,
        "mkdir -p /usr/local/sbin && cat > /usr/local/sbin/mkfs.ext4 <<'END'\n"
        "#!/bin/sh\ntouch /run/begun\n"
        "while [ ! -e /run/go ]; do sleep 0.05; done\n"
        'exec /sbin/mkfs.ext4 "$@"\n'
        "END\nchmod +x /usr/local/sbin/mkfs.ext4",
    )
    await shared_vm.host.attach(one)
    mounting = asyncio.create_task(shared_vm.guest.mount(mount))
    try:
        await shell(shared_vm, "while [ ! -e /run/begun ]; do sleep 0.05; done")
        async with asyncio.timeout(5):
            for _ in range(5):
                found = await ask(shared_vm, mount)
                assert found == replace(only_devices(one), busy=frozenset({one.serial}))
        assert not mounting.done()
    finally:
        await shell(shared_vm, "touch /run/go")
        await mounting
        await shell(shared_vm, "rm /run/begun /run/go /usr/local/sbin/mkfs.ext4")
    assert await ask(shared_vm, mount) == there(mount)
    await let_go(shared_vm, mount)


async def test_256_disks_with_a_mount_each(shared_vm: Machine, tmp_path: Path) -> None:
    """All are there, said within seconds, and other requests do not wait for that."""
    vm = shared_vm
    image = disks.ext4(tmp_path / "0.raw", size=2 * disks.MIB)
    mounts = []
    for number in range(256):
        path = tmp_path / f"{number}.raw"
        if number:
            shutil.copy(image, path)
        one = attachment(path, f"n{number}", slot=Slot(number // 64, number % 64))
        mounts.append(GuestMount(one, f"/run/many/{number}", EXT4))
    busy = asyncio.Semaphore(32)

    async def add(mount: GuestMount) -> None:
        async with busy:
            await vm.host.attach(mount.attachment)
            await vm.guest.mount(mount)

    await asyncio.gather(*map(add, mounts))
    start = time.monotonic()
    assert await ask(vm, *mounts) == there(*mounts)
    took = time.monotonic() - start
    nobody = attachment(tmp_path / "none", "none", slot=Slot(0, 200))
    asking = asyncio.create_task(ask(vm, *mounts))
    start = time.monotonic()
    await asyncio.sleep(0)
    await vm.guest.unplug(nobody)
    beside = time.monotonic() - start
    sys.stdout.write(f"256 disks: {took:.3f} s; another request beside that: {beside:.3f} s\n")
    assert await asking == there(*mounts)
    assert took < 5
    assert beside < took
    await asyncio.gather(*(vm.guest.unmount(mount) for mount in mounts))
    assert await ask(vm, *mounts) == only_devices(*(mount.attachment for mount in mounts))
    await asyncio.gather(*(vm.guest.unplug(mount.attachment) for mount in mounts))
    await asyncio.gather(*(vm.host.detach(mount.attachment) for mount in mounts))
    # So many events at once are more than the kernel has room for; it looks through the bus then,
    # and can find again what was let go and not detached yet. That goes with the news of it.
    async with asyncio.timeout(30):
        while await ask(vm, *mounts) != NOTHING:
            pass
