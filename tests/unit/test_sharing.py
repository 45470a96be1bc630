"""Rules 1 and 2: the same disk is attached once, the same mount made once."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from typing import TYPE_CHECKING

import pytest
from support.memory import EXT4, FORMATS, UP, VM, XFS, A, B, turns

from hotlun import (
    BackendError,
    Disk,
    DiskConflictError,
    DiskKind,
    ImageFormat,
    MountConfig,
    Secret,
)

if TYPE_CHECKING:
    from pathlib import Path


LINKS = pytest.mark.skipif(os.name == "nt", reason="Wine makes no symbolic links")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"one")
    return path


async def test_a_second_add_shares_attachment_and_mount(vm: VM) -> None:
    """Two equal adds: one attach, one mount, two handles at one path."""
    one, two = await vm.add(), await vm.add()
    assert vm.said() == UP
    assert (one.slot, one.guest_path, one.serial) == (two.slot, two.guest_path, two.serial)
    assert one.id != two.id
    assert vm.manager.mounts == (one, two)
    assert vm.status().holders == 2


async def test_racing_adds_share_one_attach(vm: VM) -> None:
    """Work on one disk is done once, however many ask for it at once."""
    mounts = await asyncio.gather(*(vm.add() for _ in range(10)))
    assert vm.said() == UP
    assert len({m.guest_path for m in mounts}) == 1


async def test_a_hard_link_is_the_same_disk(vm: VM, image: Path, tmp_path: Path) -> None:
    """A file is known by its inode, whatever it is called."""
    link = tmp_path / "other.img"
    os.link(image, link)
    one, two = await vm.add(str(image)), await vm.add(str(link))
    assert one.slot == two.slot


@LINKS
async def test_a_symbolic_link_is_the_same_disk(vm: VM, image: Path, tmp_path: Path) -> None:
    """Identity is of the file that the path leads to."""
    link = tmp_path / "link.img"
    link.symlink_to(image)
    one, two = await vm.add(str(link)), await vm.add(str(image))
    assert one.slot == two.slot
    assert one.disk.path == str(image)


async def test_a_path_that_does_not_exist_here_is_canonical(vm: VM) -> None:
    """Without a file, the canonical path is the identity."""
    folder, name = os.path.split(A)
    one = await vm.add(os.path.join(folder, ".", "sub", "..", name))
    two = await vm.add(A)
    assert one.slot == two.slot


async def test_a_replaced_file_conflicts(vm: VM, image: Path, tmp_path: Path) -> None:
    """A path that meanwhile names another file than the attached one is not that disk."""
    await vm.add(str(image))
    other = tmp_path / "other"
    other.write_bytes(b"two")
    os.replace(other, image)
    vm.said()
    with pytest.raises(DiskConflictError, match="another file"):
        await vm.add(str(image))
    assert vm.said() == []


@LINKS
@pytest.mark.parametrize("target", ["other.img", "nowhere.img"])
async def test_a_file_replaced_by_a_link_conflicts(
    vm: VM, image: Path, tmp_path: Path, target: str
) -> None:
    """The path that was attached leads on to another file now, or to none."""
    (tmp_path / "other.img").write_bytes(b"two")
    await vm.add(str(image))
    image.unlink()
    image.symlink_to(tmp_path / target)
    with pytest.raises(DiskConflictError, match=r"disk\.img names another file"):
        await vm.add(str(image))


@LINKS
async def test_a_link_that_leads_elsewhere_now_is_another_disk(
    vm: VM, image: Path, tmp_path: Path
) -> None:
    """The attached disk is known by its own path, not by the link that led to it."""
    link, other = tmp_path / "link.img", tmp_path / "other.img"
    other.write_bytes(b"two")
    link.symlink_to(image)
    one = await vm.add(str(link))
    link.unlink()
    link.symlink_to(other)
    assert (await vm.add(str(link))).slot != one.slot


async def test_a_file_that_came_into_being_conflicts(vm: VM, tmp_path: Path) -> None:
    """Attached while it did not exist here: nobody can say that it is the same."""
    path = tmp_path / "late.img"
    await vm.add(str(path))
    path.write_bytes(b"")
    with pytest.raises(DiskConflictError):
        await vm.add(str(path))


async def test_a_path_whose_own_attachment_is_gone_finds_the_file(
    vm: VM, image: Path, tmp_path: Path
) -> None:
    """An add that was cancelled before its first step does not hide whose file it is now."""
    one = await vm.add(str(image))
    link = tmp_path / "link.img"
    cancelled = vm.start(str(link))
    await asyncio.sleep(0)
    cancelled.cancel()
    os.link(image, link)
    assert (await vm.add(str(link))).slot == one.slot


async def test_a_file_that_has_gone_is_still_shared(vm: VM, image: Path) -> None:
    """Its path names no other identity."""
    one = await vm.add(str(image))
    image.unlink()
    two = await vm.add(str(image))
    assert one.slot == two.slot


async def test_a_file_made_anew_after_it_had_gone_conflicts(vm: VM, image: Path) -> None:
    """Gone, and then another file at the same path."""
    await vm.add(str(image))
    image.rename(image.with_suffix(".kept"))
    image.write_bytes(b"new")
    with pytest.raises(DiskConflictError):
        await vm.add(str(image))


async def test_another_kind_conflicts(vm: VM) -> None:
    """An image file is not attached as a physical disk as well."""
    await vm.add(A)
    vm.said()
    with pytest.raises(DiskConflictError, match="VirtualDisk") as caught:
        await vm.manager.add_physical_disk(A)
    assert caught.value.slot == (await vm.add(A)).slot
    assert vm.said() == []


async def test_another_read_only_conflicts(vm: VM) -> None:
    """A writable attachment cannot be shared read-only, nor the other way round."""
    await vm.add(A)
    await vm.add(B, read_only=True)
    with pytest.raises(DiskConflictError, match="writable"):
        await vm.add(A, read_only=True)
    with pytest.raises(DiskConflictError, match="read-only"):
        await vm.add(B)


async def test_another_stated_format_conflicts(vm: VM) -> None:
    """A stated format is compared with what the attachment has, an unstated one is not."""
    one = await vm.add(A, format=ImageFormat.RAW)
    assert (await vm.add(A)).slot == one.slot
    with pytest.raises(DiskConflictError, match="raw"):
        await vm.add(A, format=ImageFormat.VHDX)


async def test_a_stated_format_conflicts_with_an_unresolved_one(vm: VM) -> None:
    """Nobody said how the attached bytes are read."""
    await vm.add("/disks/nameless")
    with pytest.raises(DiskConflictError, match="unstated"):
        await vm.add("/disks/nameless", format=ImageFormat.RAW)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("d.raw", ImageFormat.RAW),
        ("d.img", ImageFormat.RAW),
        ("d.qcow2", ImageFormat.QCOW2),
        ("d.vhd", ImageFormat.VHD),
        ("d.vpc", ImageFormat.VHD),
        ("d.VHDX", ImageFormat.VHDX),
        ("d", None),
        ("d.iso", None),
    ],
)
async def test_the_suffix_tells_the_format(vm: VM, name: str, expected: ImageFormat | None) -> None:
    """A format that is not stated follows from the name, or stays unknown."""
    path = os.path.join(os.path.dirname(A), name)
    mount = await vm.add(path)
    assert mount.disk == Disk(path, DiskKind.VIRTUAL_DISK, format=expected)


@LINKS
async def test_the_suffix_is_the_canonical_paths(vm: VM, image: Path, tmp_path: Path) -> None:
    """A link's own name says nothing."""
    link = tmp_path / "link.vhdx"
    link.symlink_to(image)
    assert (await vm.add(str(link))).disk.format is ImageFormat.RAW


async def test_an_extensible_disk_is_known_as_written(vm: VM) -> None:
    """Provider and path, byte for byte; nothing is normalised."""
    add = vm.manager.add_extensible_virtual_disk
    one = await add("evd://nbd/a//b/../c")
    assert one.disk == Disk("a//b/../c", DiskKind.EXTENSIBLE_VIRTUAL_DISK, provider="nbd")
    two = await add("evd://nbd/a//b/../c")
    other = await add("evd://nbd/a/c")
    assert one.slot == two.slot != other.slot


@pytest.mark.parametrize(
    "path", ["", "nbd/x", "evd://", "evd://nbd", "evd://nbd/", "evd:///x", "EVD://nbd/x"]
)
async def test_anything_else_is_no_extensible_disk(vm: VM, path: str) -> None:
    """Only `evd://<provider>/<path>`, both parts not empty."""
    with pytest.raises(ValueError, match="evd://"):
        await vm.manager.add_extensible_virtual_disk(path)


async def test_an_equal_config_joins_whatever_path_it_asks_for(vm: VM) -> None:
    """The first one's path is everybody's."""
    one = await vm.add(guest_path="/mnt/one")
    two = await vm.add(guest_path="/mnt/two")
    assert one.guest_path == two.guest_path == "/mnt/one"
    assert vm.said() == UP


async def test_a_joining_path_must_be_valid_all_the_same(vm: VM) -> None:
    """A path that could never be right is refused even if it would not be used."""
    await vm.add()
    with pytest.raises(ValueError, match="absolute"):
        await vm.add(guest_path="relative")


async def test_of_equal_adds_racing_the_first_ones_path_counts(vm: VM) -> None:
    """Decided when the add is, not when the mount is made."""
    one, two = await asyncio.gather(vm.add(guest_path="/mnt/1"), vm.add(guest_path="/mnt/2"))
    assert one.guest_path == two.guest_path == "/mnt/1"


async def test_options_in_another_order_are_the_same_mount(vm: VM) -> None:
    """Order and repeats make no difference."""
    one = await vm.add(mount=MountConfig(options=["noatime", "nodev"]))
    two = await vm.add(mount=MountConfig(options=["nodev", "noatime", "nodev"]))
    assert one.guest_path == two.guest_path


async def test_another_config_is_a_second_mount_on_the_attachment(vm: VM) -> None:
    """One attach, two guest mounts."""
    one, two = await vm.add(mount=EXT4), await vm.add(mount=XFS)
    assert one.slot == two.slot
    assert one.guest_path != two.guest_path
    assert vm.said() == ["attach", "mount", "mount"]
    assert len(vm.status().guest_mounts) == 2


async def test_attaching_without_mounting_shares_too(vm: VM) -> None:
    """Such a handle holds a reference on the attachment alone."""
    bare, mounted = await vm.add(mount=None), await vm.add()
    assert bare.guest_path is None
    assert bare.config is None
    await mounted.release()
    assert vm.said() == ["attach", "mount", "unmount"]
    await bare.release()
    assert vm.said() == ["unplug", "detach"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (FORMATS, EXT4),
        (EXT4, FORMATS),
        (FORMATS, MountConfig(partition=1)),
        (MountConfig(partition=1, filesystem="xfs", ensure_filesystem=True), EXT4),
        (
            MountConfig(partition=2),
            MountConfig(partition=2, filesystem="xfs", ensure_filesystem=True),
        ),
    ],
)
async def test_an_overlap_with_one_that_may_format_conflicts(
    vm: VM, first: MountConfig, second: MountConfig
) -> None:
    """Nobody formats under somebody else's mount."""
    await vm.add(mount=first)
    vm.said()
    with pytest.raises(DiskConflictError, match="format"):
        await vm.add(mount=second)
    assert vm.said() == []


KEYED = MountConfig(encrypted=True, key=Secret("one"))
VERIFIED = MountConfig(verity="ab" * 32)


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (KEYED, MountConfig(encrypted=True, key=Secret("two")), "this request decrypts"),
        (KEYED, dataclasses.replace(KEYED, options=["noatime"]), "this request decrypts"),
        (KEYED, MountConfig(partition=1), "that mount decrypts"),
        (EXT4, KEYED, "this request decrypts"),
        (VERIFIED, MountConfig(verity="cd" * 32), "this request verifies"),
        (VERIFIED, EXT4, "that mount verifies"),
        (MountConfig(partition=2), VERIFIED, "this request verifies"),
    ],
)
async def test_an_overlap_with_one_that_is_mapped_conflicts(
    vm: VM, first: MountConfig, second: MountConfig, why: str
) -> None:
    """A volume is opened once and in one way, and nobody mounts below it meanwhile."""
    await vm.add(mount=first, read_only=True)
    vm.said()
    with pytest.raises(DiskConflictError, match=why):
        await vm.add(mount=second, read_only=True)
    assert vm.said() == []


@pytest.mark.parametrize("config", [KEYED, VERIFIED])
async def test_equal_configs_that_are_mapped_are_shared(vm: VM, config: MountConfig) -> None:
    """The key or the root hash counts, not the object that holds it; partitions differ."""
    one = await vm.add(mount=dataclasses.replace(config, partition=1), read_only=True)
    two = await vm.add(mount=dataclasses.replace(config, partition=1), read_only=True)
    other = await vm.add(mount=dataclasses.replace(config, partition=2), read_only=True)
    assert one.guest_path == two.guest_path != other.guest_path
    assert vm.said() == ["attach", "mount", "mount"]


async def test_another_key_meets_a_teardown_and_waits(vm: VM) -> None:
    """Once the volume is closed it may be tried with another."""
    keeper = await vm.add(mount=None)
    old = await vm.add(mount=KEYED)
    gate = vm.guest.stall("unmount")
    release = asyncio.create_task(old.release())
    await gate.reached.wait()
    adding = vm.start(mount=MountConfig(encrypted=True, key=Secret("two")))
    await turns()
    assert not adding.done()
    gate.open()
    await release
    assert (await adding).slot == keeper.slot


async def test_partitions_side_by_side_may_be_formatted(vm: VM) -> None:
    """Different partitions do not overlap."""
    one = await vm.add(mount=MountConfig(partition=1, filesystem="xfs", ensure_filesystem=True))
    two = await vm.add(mount=MountConfig(partition=2, filesystem="xfs", ensure_filesystem=True))
    assert one.slot == two.slot


async def test_an_equal_config_that_formats_is_shared(vm: VM) -> None:
    """It is one and the same mount; formatting happened once."""
    one, two = await vm.add(mount=FORMATS), await vm.add(mount=FORMATS)
    assert one.guest_path == two.guest_path
    assert vm.said() == UP


async def test_an_overlap_in_teardown_is_waited_for(vm: VM) -> None:
    """The formatting add begins when the other mount is gone."""
    keeper = await vm.add(mount=None)
    old = await vm.add(mount=EXT4)
    gate = vm.guest.stall("unmount")
    release = asyncio.create_task(old.release())
    await gate.reached.wait()
    adding = vm.start(mount=FORMATS)
    await turns()
    assert not adding.done()
    gate.open()
    await release
    assert (await adding).slot == keeper.slot
    assert vm.said() == ["attach", "mount", "unmount", "mount"]


async def test_the_guest_may_refuse_a_new_mount_before_anything_is_touched(
    vm: VM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check` is asked once for each new guest mount, not for joining nor for a bare attach."""
    asked: list[tuple[Disk, MountConfig, str]] = []

    def check(disk: Disk, config: MountConfig, path: str) -> None:
        asked.append((disk, config, path))
        if config is XFS:
            raise BackendError("no xfs here")

    monkeypatch.setattr(vm.guest, "check", check)
    await vm.add(mount=None)
    one = await vm.add(guest_path="/mnt/x")
    await vm.add()
    assert asked == [(one.disk, EXT4, "/mnt/x")]
    vm.said()
    with pytest.raises(BackendError, match="no xfs"):
        await vm.add(B, mount=XFS, guest_path="/mnt/y")
    assert vm.said() == []
    assert (await vm.add(B, guest_path="/mnt/y")).guest_path == "/mnt/y"
