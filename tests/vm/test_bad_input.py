"""Disks and paths that cannot be: a clear error in time, no slot lost, no image touched."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import disks
from support.guest_shell import note_in, shell
from support.machine import look

from hotlun import (
    BackendError,
    HotlunError,
    Manager,
    MountConfig,
    Slot,
    SlotState,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotlun.vm import Machine

    Maker = Callable[[Path], Path]
    Case = tuple[Maker, dict[str, Any], str]
    """Makes the disk; how it is asked for; what the error says."""

pytestmark = pytest.mark.asyncio(loop_scope="module")

MOUNTED = MountConfig()
DEADLINE = 30.0
"""Seconds for any refusal; the longest wait of our own, for a device, is 10."""


def named(name: str, make: Callable[..., Path], *arguments: Any) -> Maker:
    """Makes this file in a folder."""
    return lambda folder: make(folder / name, *arguments)


def missing(path: Path) -> Path:
    return path


def directory(path: Path) -> Path:
    path.mkdir()
    return path


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def cut(path: Path, format: str, kept: int) -> Path:  # noqa: A002 - the word of the API
    """A good image of the format, of which only so many bytes are left."""
    source = disks.ext4(path.with_name("source"))
    disks.converted(source, path, format)
    os.truncate(path, kept)
    return path


def damaged(path: Path) -> Path:
    """An ext4 whose superblock says nonsense (but that it is an ext4)."""
    disks.ext4(path)
    with path.open("r+b") as file:
        file.seek(1024)
        file.write(b"\xff" * 0x38)
    return path


KB, MB = 1 << 10, 1 << 20

REFUSED_BY_THE_HOST: dict[str, Case] = {
    "no such file": (named("disk.raw", missing), {}, "No such file"),
    "a directory": (named("disk.raw", directory), {}, "is a directory"),
    "a fifo": (named("disk.raw", fifo), {}, "not a regular file"),
    "below a file": (lambda _: Path("/etc/passwd/disk.raw"), {}, "Not a directory"),
    "a name that does not tell": (named("disk", disks.ext4), {}, "format= "),
    "an empty raw": (named("disk.raw", disks.blank, 0), {}, "less than one sector"),
    "a stump of a raw": (named("disk.raw", cut, "raw", 100), {}, "less than one sector"),
    "a truncated qcow2": (named("disk.qcow2", cut, "qcow2", 300 * KB), {}, "truncated"),
    "a stump of a qcow2": (named("disk.qcow2", cut, "qcow2", 60), {}, "qcow2"),
    "a truncated vhd": (named("disk.vhd", cut, "vpc", 3 * MB), {}, "truncated|vhd"),
    "a truncated vhdx": (named("disk.vhdx", cut, "vhdx", 9 * MB), {}, "truncated"),
    "a stump of a vhdx": (named("disk.vhdx", cut, "vhdx", 100 * KB), {}, "vhdx"),
    "raw as qcow2": (named("disk.qcow2", disks.ext4), {}, "not a usable qcow2"),
    "raw as vhd": (named("disk.vhd", disks.ext4), {}, "not a usable vhd"),
    "raw as vhdx": (named("disk.vhdx", disks.ext4), {}, "not a usable vhdx"),
    "qcow2 as vhdx": (named("d", disks.image, "qcow2"), {"format": "vhdx"}, "not a usable vhdx"),
    "vhdx as vhd": (named("d", disks.image, "vhdx"), {"format": "vhd"}, "not a usable vhd"),
    "vhd as qcow2": (named("d", disks.image, "vpc"), {"format": "qcow2"}, "not a usable qcow2"),
}  # fmt: skip

with_ext4 = named("disk.raw", disks.ext4)
with_partitions = named("disk.raw", disks.partitioned, "gpt", {1: "one"})
REFUSED_BY_THE_GUEST: dict[str, Case] = {
    "a partition that is not there": (
        with_partitions, {"mount": MountConfig(partition=2)}, "has no partition 2; it has sd.1",
    ),
    "a partition of a disk without any": (
        with_ext4, {"mount": MountConfig(partition=1)}, "has no partition 1; it has none",
    ),
    "a partition far beyond": (
        with_partitions, {"mount": MountConfig(partition=2**63)}, "partition 9223372036854775808",
    ),
    "a table where a filesystem should be": (with_partitions, {}, "partition table; say which"),
    "a filesystem that the guest lacks": (
        with_ext4, {"mount": MountConfig(filesystem="reiserfs")}, "no such filesystem",
    ),
    "a filesystem that is on no disk": (
        with_ext4, {"mount": MountConfig(filesystem="proc")}, "not on disks",
    ),
    "another filesystem than stated": (
        with_ext4, {"mount": MountConfig(filesystem="xfs")}, "not such a filesystem",
    ),
    "a filesystem that cannot be made": (
        named("disk.raw", disks.blank),
        {"mount": MountConfig(filesystem="vfat", ensure_filesystem=True)},
        "ext4, xfs and btrfs",
    ),
    "too small for what is to be made": (
        named("disk.raw", disks.blank, 64 * KB),
        {"mount": MountConfig(filesystem="xfs", ensure_filesystem=True)},
        "mkfs.xfs",
    ),
    "to be made on a read-only disk": (
        named("disk.raw", disks.blank),
        {"mount": MountConfig(filesystem="ext4", ensure_filesystem=True), "read_only": True},
        "is read-only",
    ),
    "a blank disk": (named("disk.raw", disks.blank), {}, "no filesystem that is known"),
    "a damaged filesystem": (named("disk.raw", damaged), {}, "cannot be mounted|no filesystem"),
    "an option that nobody knows": (
        with_ext4, {"mount": MountConfig(options=["nonsense=1"])}, "Unknown parameter 'nonsense'",
    ),
    "a path where something is mounted": (
        with_ext4, {"guest_path": "/mnt/used"}, "is in use: theirs",
    ),
    "a path that is a file": (with_ext4, {"guest_path": "/etc/passwd"}, "is no directory"),
    "a path below a file": (with_ext4, {"guest_path": "/etc/passwd/x"}, "/etc/passwd"),
    "a path that is a link to nowhere": (with_ext4, {"guest_path": "/mnt/link"}, "/mnt/link"),
    "a path where nothing can be made": (with_ext4, {"guest_path": "/proc/x/y"}, "cannot be made"),
    "a link where there is a directory": (
        with_ext4,
        {"guest_path": "/mnt/used", "mount": MountConfig(block_device=True)},
        "/mnt/used",
    ),
}  # fmt: skip


async def refused(manager: Manager, path: Path, words: str, **arguments: Any) -> HotlunError:
    """The error of an add, which has left the image alone and the slots free."""
    before = disks.digest(path) if path.is_file() else None
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(BackendError, match=words) as caught:
            await manager.add_virtual_disk(path, **{"mount": MOUNTED, **arguments})
    assert str(path) in str(caught.value)
    assert not hasattr(caught.value, "__notes__"), "cleaning up failed as well"
    assert str(caught.value.disk) == str(path)
    assert {status.state for status in manager.slots()} == {SlotState.FREE}
    assert manager.mounts == ()
    assert before is None or disks.digest(path) == before
    return caught.value


class TestOnTheHost:
    @pytest.mark.parametrize("case", REFUSED_BY_THE_HOST)
    async def test_what_is_no_disk_is_refused(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path, case: str
    ) -> None:
        """Before anything is attached, with the path, the slot and what to do about it."""
        make, arguments, words = REFUSED_BY_THE_HOST[case]
        error = await refused(manager, make(tmp_path), words, **arguments)
        assert (error.operation, error.slot) == ("attach", Slot(0, 0))


class TestInTheGuest:
    @pytest.mark.parametrize("case", REFUSED_BY_THE_GUEST)
    async def test_what_cannot_be_mounted_is_detached_again(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path, case: str
    ) -> None:
        """The guest's reason is in the error, and nothing of the attempt is left in guest or VM."""
        await shell(
            shared_vm,
            "mkdir -p /mnt/used && mount -t tmpfs theirs /mnt/used && ln -s /nowhere /mnt/link",
        )
        try:
            before = await look(shared_vm)
            make, arguments, words = REFUSED_BY_THE_GUEST[case]
            error = await refused(manager, make(tmp_path), words, **arguments)
            assert (error.operation, error.slot) == ("mount", Slot(0, 0))
            assert error.detail
            assert await look(shared_vm) == before
        finally:
            await shell(shared_vm, "umount /mnt/used; rm -r /mnt/*; test ! -e /nowhere")

    async def test_a_refused_mount_spares_the_disks_other_mounts(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """On a disk that is in use, only the new guest mount is given up."""
        path = disks.partitioned(tmp_path / "disk.raw", "gpt", {1: "one"})
        mount = await manager.add_virtual_disk(path, mount=MountConfig(partition=1))
        before = await look(shared_vm)
        with pytest.raises(BackendError, match="has no partition 7"):
            await manager.add_virtual_disk(path, mount=MountConfig(partition=7))
        assert await look(shared_vm) == before
        assert await note_in(shared_vm, mount) == "one"

    async def test_many_bad_ones_among_good_ones(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """Side by side, each gets its own outcome."""
        good = [disks.ext4(tmp_path / f"{number}.raw", str(number)) for number in range(4)]
        bad = [disks.blank(tmp_path / f"blank{number}.raw") for number in range(4)]
        add = partial(manager.add_virtual_disk, mount=MOUNTED)
        order = [path for pair in zip(bad, good, strict=True) for path in pair]
        done = await asyncio.gather(*map(add, order), return_exceptions=True)
        assert all(isinstance(outcome, BackendError) for outcome in done[::2])
        for number, mount in enumerate(done[1::2]):
            assert not isinstance(mount, BaseException)
            assert await note_in(shared_vm, mount) == str(number)
        assert len((await look(shared_vm)).scsi) == 4


async def test_a_server_that_goes_away_does_not_keep_its_disk(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """The NBD server of a mounted disk dies: the loss is said once, then the disk is released."""
    path = disks.ext4(tmp_path / "disk.raw", "served")
    url = f"evd://nbd/unix:{tmp_path}/nbd.sock"
    with disks.nbd_server(path, tmp_path / "nbd.sock", ""):
        mount = await manager.add_extensible_virtual_disk(url, mount=MOUNTED)
        assert await note_in(shared_vm, mount) == "served"
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(BackendError, match="something that was written to it is lost"):
            await mount.release()
        await mount.release()
