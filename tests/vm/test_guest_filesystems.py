"""Filesystems on a real guest, as a table: {ext4, xfs, btrfs} by what the disk is like.

The first seven tests are its columns: blank, same, other, encrypted, partition, read-only,
preserve_data. What no disk may lose is looked at from the host, block by block.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from support import contents, disks
from support.guest_shell import mounted_at, note_in, shell
from support.images import IMAGES, raid

from hotlun import BackendError, Disk, DiskKind, Manager, MountConfig, Slot
from hotlun.model import Attachment, GuestMount
from hotlun.vm import MachineError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hotlun.vm import Machine

pytestmark = pytest.mark.asyncio(loop_scope="module")

each = pytest.mark.parametrize("filesystem", contents.SIZES)

OTHER = {"ext4": "btrfs", "xfs": "ext4", "btrfs": "xfs"}
UNWRITTEN = {"ext4": ["ro"], "xfs": ["ro", "norecovery"], "btrfs": ["ro"]}
"""Options under which the kernel writes nothing: xfs covers its log even when it is read-only."""
LABEL = {"ext4": "gpt", "xfs": "dos", "btrfs": "gpt"}


def ensured(filesystem: str, **more: Any) -> MountConfig:
    """Made if it is not there."""
    return MountConfig(filesystem=filesystem, ensure_filesystem=True, **more)


def blank(path: Path, filesystem: str) -> Path:
    """As large as that needs."""
    return disks.blank(path, contents.SIZES[filesystem])


def other(path: Path, filesystem: str) -> Path:
    """As large as that needs, with another filesystem."""
    size = max(contents.SIZES[filesystem], contents.SIZES[OTHER[filesystem]])
    return contents.made(path, OTHER[filesystem], "other", size)


@each
async def test_blank(shared_vm: Machine, manager: Manager, tmp_path: Path, filesystem: str) -> None:
    """It is formatted, soundly, and found the next time without being named."""
    path = blank(tmp_path / "disk.raw", filesystem)
    mount = await manager.add_virtual_disk(path, mount=ensured(filesystem))
    assert (await mounted_at(shared_vm, mount)).filesystem == filesystem
    await shell(shared_vm, f"echo kept > {mount.guest_path}/note")
    await mount.release()
    contents.check(path, filesystem)
    mount = await manager.add_virtual_disk(path, mount=MountConfig())
    assert await note_in(shared_vm, mount) == "kept\n"


@each
async def test_same(shared_vm: Machine, manager: Manager, tmp_path: Path, filesystem: str) -> None:
    """It is not made anew: its UUID and files stay; and if only the agent can write, every byte."""
    path = contents.made(tmp_path / "disk.raw", filesystem, "kept")
    uuid = contents.uuid(path, filesystem)
    mount = await manager.add_virtual_disk(path, mount=ensured(filesystem))
    assert await note_in(shared_vm, mount) == "kept"
    await shell(shared_vm, f"echo more > {mount.guest_path}/more")
    await mount.release()
    contents.check(path, filesystem)
    assert contents.uuid(path, filesystem) == uuid
    superblock, before = contents.superblock(path, filesystem), contents.written(path)
    mount = await manager.add_virtual_disk(
        path, mount=ensured(filesystem, options=UNWRITTEN[filesystem])
    )
    assert await note_in(shared_vm, mount) == "kept"
    assert await shell(shared_vm, f"cat {mount.guest_path}/more") == "more\n"
    await mount.release()
    assert contents.superblock(path, filesystem) == superblock
    assert contents.written(path) == before


@each
async def test_other(shared_vm: Machine, manager: Manager, tmp_path: Path, filesystem: str) -> None:
    """Another filesystem gives way to the one that is to be there."""
    path = other(tmp_path / "disk.raw", filesystem)
    mount = await manager.add_virtual_disk(path, mount=ensured(filesystem))
    assert (await mounted_at(shared_vm, mount)).filesystem == filesystem
    await shell(shared_vm, f"test ! -e {mount.guest_path}/note")
    await mount.release()
    contents.check(path, filesystem)
    mount = await manager.add_virtual_disk(path, mount=MountConfig())
    assert (await mounted_at(shared_vm, mount)).filesystem == filesystem


@each
async def test_encrypted(
    shared_vm: Machine, manager: Manager, tmp_path: Path, filesystem: str
) -> None:
    """Whatever was there is lost, as asked; what is written does not lie on the disk in clear."""
    path = contents.made(tmp_path / "disk.raw", filesystem, "before")
    mount = await manager.add_virtual_disk(path, mount=ensured(filesystem, encrypted=True))
    info = await mounted_at(shared_vm, mount)
    assert (info.filesystem, info.device[:8]) == (filesystem, "/dev/dm-")
    await shell(shared_vm, f"cd {mount.guest_path}; test ! -e note; seq 99999 > n; sync")
    numbers = "".join(f"{n}\n" for n in range(1, 100_000)).encode()
    in_clear = contents.written(contents.file(tmp_path / "numbers", numbers)).values()
    assert set(contents.written(path).values()).isdisjoint(in_clear)
    await mount.release()
    with pytest.raises(BackendError, match="no filesystem"):
        await manager.add_virtual_disk(path, mount=MountConfig())


@each
async def test_partition(
    shared_vm: Machine, manager: Manager, tmp_path: Path, filesystem: str
) -> None:
    """Of the whole disk, the table included, only that partition changes."""
    size = contents.SIZES[filesystem]
    path = contents.three_partitions(tmp_path / "disk.raw", LABEL[filesystem], size)
    before = contents.written(path)
    mount = await manager.add_virtual_disk(path, mount=ensured(filesystem, partition=2))
    info = await mounted_at(shared_vm, mount)
    assert (info.filesystem, info.device[-1]) == (filesystem, "2")
    await shell(shared_vm, f"echo kept > {mount.guest_path}/note")
    await mount.release()
    start, end = contents.second_partition(size)
    after = contents.written(path)
    assert {at: block for at, block in after.items() if not start <= at < end} == before
    mount = await manager.add_virtual_disk(path, mount=MountConfig(partition=2))
    assert await note_in(shared_vm, mount) == "kept\n"


@each
async def test_read_only(
    shared_vm: Machine, manager: Manager, tmp_path: Path, filesystem: str
) -> None:
    """What is there is mounted; what is not there is not made, and the error says so."""
    same = contents.made(tmp_path / "same.raw", filesystem, "kept")
    cases = {
        blank(tmp_path / "blank.raw", filesystem): "holds no known filesystem",
        other(tmp_path / "other.raw", filesystem): f"holds {OTHER[filesystem]}",
    }
    before = {path: contents.written(path) for path in (same, *cases)}
    mount = await manager.add_virtual_disk(same, read_only=True, mount=ensured(filesystem))
    assert await note_in(shared_vm, mount) == "kept"
    assert "ro" in (await mounted_at(shared_vm, mount)).options
    await mount.release()
    for path, words in cases.items():
        with pytest.raises(BackendError, match=f"is read-only and {words}"):
            await manager.add_virtual_disk(path, read_only=True, mount=ensured(filesystem))
    assert {path: contents.written(path) for path in before} == before


@each
async def test_preserve_data(
    shared_vm: Machine, manager: Manager, tmp_path: Path, filesystem: str
) -> None:
    """The same is mounted, a blank disk formatted, another refused by its name and untouched."""
    config = ensured(filesystem, preserve_data=True)
    same = contents.made(tmp_path / "same.raw", filesystem, "kept")
    mount = await manager.add_virtual_disk(same, mount=config)
    assert await note_in(shared_vm, mount) == "kept"
    nothing = blank(tmp_path / "blank.raw", filesystem)
    mount = await manager.add_virtual_disk(nothing, mount=config)
    assert (await mounted_at(shared_vm, mount)).filesystem == filesystem
    another = other(tmp_path / "other.raw", filesystem)
    before = contents.written(another)
    with pytest.raises(BackendError, match=rf"holds {OTHER[filesystem]}, .* to be preserved"):
        await manager.add_virtual_disk(another, mount=config)
    assert contents.written(another) == before


async def failure(manager: Manager, path: Path, mount: MountConfig) -> str:
    """What the error says of a disk that must be refused."""
    with pytest.raises(BackendError) as caught:
        await manager.add_virtual_disk(path, mount=mount)
    return str(caught.value)


async def test_all_that_is_recognised_is_preserved(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """Filesystems, encrypted volumes, members of LVM and RAID, swap, tables: each by its name."""
    cases: dict[Path, str] = {}
    for number, (kind, make) in enumerate(IMAGES.values()):
        if kind:
            path = tmp_path / f"{number}.raw"
            make(path)
            cases[path] = kind
    mirrored = contents.made(tmp_path / "mirrored.raw", "ext4", "on a mirror", 16 * disks.MIB)
    raid(mirrored, -0x2000)
    cases[mirrored] = "linux_raid_member"
    before = {path: contents.written(path) for path in cases}

    async def refused(path: Path, kind: str) -> str:
        wanted = "xfs" if kind.startswith("ext") else "ext4"
        return await failure(manager, path, ensured(wanted, preserve_data=True))

    said = await asyncio.gather(*(refused(path, kind) for path, kind in cases.items()))
    wrong = {
        path.name: (kind, words)
        for (path, kind), words in zip(cases.items(), said, strict=True)
        if kind not in words or "is to be preserved" not in words
    }
    assert not wrong
    assert {path: contents.written(path) for path in cases} == before


async def test_what_is_only_mounted(shared_vm: Machine, manager: Manager, tmp_path: Path) -> None:
    """ext2, ext3, vfat, erofs, squashfs and iso9660 are found out and read, and not written."""
    kinds = ("ext2", "ext3", "erofs", "squashfs")
    paths = {kind: contents.made(tmp_path / f"{kind}.raw", kind, "read") for kind in kinds}
    paths["iso9660"] = contents.iso9660(tmp_path / "iso9660.raw", "read")
    paths["vfat"] = tmp_path / "vfat.raw"
    IMAGES["vfat of 32 bits"][1](paths["vfat"])
    mount = await manager.add_virtual_disk(paths["vfat"], mount=MountConfig())
    await shell(shared_vm, f"printf read > {mount.guest_path}/note")
    await mount.release()
    before = {path: contents.written(path) for path in paths.values()}
    for kind, path in paths.items():
        mount = await manager.add_virtual_disk(path, read_only=True, mount=MountConfig())
        info = await mounted_at(shared_vm, mount)
        assert (info.filesystem, await note_in(shared_vm, mount)) == (kind, "read")
        assert "ro" in info.options
        await mount.release()
    assert {path: contents.written(path) for path in before} == before


async def test_what_is_no_filesystem(manager: Manager, tmp_path: Path) -> None:
    """It is not mounted, and the error says what it is."""
    expected = {
        "swap": "holds swap, which is no filesystem",
        "LUKS 2": "holds crypto_LUKS, which is no filesystem",
        "LVM": "holds LVM2_member, which is no filesystem",
        "RAID 1.2": "holds linux_raid_member, which is no filesystem",
        "GPT": "holds a partition table; say which partition to mount",
        "MBR": "holds a partition table; say which partition to mount",
        "blank": "holds no filesystem that is known here",
    }
    for number, (name, words) in enumerate(expected.items()):
        path = tmp_path / f"{number}.raw"
        IMAGES[name][1](path)
        before = contents.written(path)
        assert words in await failure(manager, path, MountConfig())
        assert contents.written(path) == before


@contextlib.asynccontextmanager
async def unreadable(vm: Machine, path: Path, offset: int) -> AsyncIterator[Attachment]:
    """A disk of which the guest cannot read one sector, and can write all."""
    error = {"event": "none", "iotype": "read", "errno": 5, "sector": offset // 512, "once": False}
    fails = {"image": {"driver": "file", "filename": str(path)}, "inject-error": [error]}
    node = {"driver": "raw", "file": {"driver": "blkdebug", **fails}}
    slot = Slot(0, 40)
    where = {"bus": "scsi0.0", "channel": 0, "scsi-id": 0, "lun": slot.lun}
    await vm.query("blockdev-add", {"node-name": "bad", **node})
    await vm.query("device_add", {"driver": "scsi-hd", "id": "bad", "drive": "bad", **where})
    attachment = Attachment(slot, Disk(str(path), DiskKind.VIRTUAL_DISK), "bad")
    try:
        yield attachment
    finally:
        await vm.guest.unplug(attachment)
        await vm.query("device_del", {"id": "bad"})
        async with asyncio.timeout(30):
            while not await deleted(vm, "bad"):
                await asyncio.sleep(0.02)


async def deleted(vm: Machine, node: str) -> bool:
    """Whether QEMU has taken a node away, which it does when the device on it is gone."""
    try:
        await vm.query("blockdev-del", {"node-name": node})
    except MachineError as error:
        if "in use" not in str(error):
            raise
        return False
    return True


UNREADABLE = {
    "first sector": (0, ensured("xfs")),
    "where ext4 would be": (1024, ensured("ext4")),
    "where btrfs would be": (64 * 1024, ensured("btrfs")),
    "the first MiB's end": (1000 * 1024, ensured("ext4", preserve_data=True)),
    "last sector": (-512, ensured("ext4", encrypted=True, preserve_data=True)),
}


async def test_a_read_error_is_not_blank(shared_vm: Machine, tmp_path: Path) -> None:
    """Wherever a disk cannot be read, that is an error, and nothing is made on it."""
    for what, (offset, config) in UNREADABLE.items():
        path = disks.blank(tmp_path / f"{what}.raw", 384 * disks.MIB)
        async with unreadable(shared_vm, path, offset % (384 * disks.MIB)) as attachment:
            with pytest.raises(BackendError, match=r"cannot be read.*Input/output error"):
                await shared_vm.guest.mount(GuestMount(attachment, "/mnt/bad", config))
        assert contents.written(path) == {}, what


async def test_big_disks_format_fast(shared_vm: Machine, manager: Manager, tmp_path: Path) -> None:
    """1 TiB each, without the time and the host's space that a table of all inodes takes."""
    paths = {kind: disks.blank(tmp_path / f"{kind}.raw", 1 << 40) for kind in contents.SIZES}
    async with asyncio.timeout(30):
        for kind, path in paths.items():
            mount = await manager.add_virtual_disk(path, mount=ensured(kind))
            where = mount.guest_path
            free = await shell(shared_vm, f"echo kept > {where}/note; stat -fc '%a %S' {where}")
            blocks, size = map(int, free.split())
            assert blocks * size > 900 << 30
            await mount.release()
    for path in paths.values():
        assert contents.allocated(path) < 1 << 30
