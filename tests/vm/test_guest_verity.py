"""Read-only disks under a root hash, on a real guest: what was changed cannot be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support import contents, disks, verified
from support.guest_shell import mounted_at, shell
from support.machine import look

from hotlun import BackendError, Manager, MountConfig, UnsupportedError
from hotlun.model import Verity

if TYPE_CHECKING:
    from pathlib import Path

    from support.verified import Verified

    from hotlun import Mount
    from hotlun.vm import Machine

pytestmark = pytest.mark.asyncio(loop_scope="module")

FIRST, SECOND, THIRD = verified.FILES


async def read(vm: Machine, mount: Mount) -> dict[str, bool]:
    """Of each file in the mount, whether it can be read, and is what it was."""
    script = f"cd {mount.guest_path}; for name in *; do md5sum $name && wc -c < $name; done || :"
    said = (await vm.run(script)).stdout
    whole = str(disks.MIB)
    return {name: f" {name}\n{whole}\n" in said for name in verified.FILES}


def shown(image: Verified, **more: Any) -> MountConfig:
    """Under the right root hash, the tree where the caller says if it is not right behind."""
    offset = image.tree if image.tree != image.size else 0
    return MountConfig(verity=Verity(image.root_hash, offset), **more)


each = pytest.mark.parametrize(
    ("filesystem", "gap"),
    [("ext4", 0), ("erofs", 64 * 1024)],
    ids=["ext4, the tree behind it", "erofs, the tree where it is said to be"],
)


class TestTheRightRootHash:
    @pytest.mark.parametrize("gap", [0, 64 * 1024], ids=["behind it", "where it is said to be"])
    @pytest.mark.parametrize("filesystem", ["ext4", "erofs"])
    async def test_everything_can_be_read(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path, filesystem: str, gap: int
    ) -> None:
        """From a mapped device that is read-only; the release leaves nothing of it."""
        before = await look(shared_vm)
        image = verified.made(tmp_path / "disk.raw", filesystem, gap)
        mount = await manager.add_virtual_disk(image.path, read_only=True, mount=shown(image))
        info = await mounted_at(shared_vm, mount)
        assert (info.filesystem, info.device[:8]) == (filesystem, "/dev/dm-")
        assert await read(shared_vm, mount) == {FIRST: True, SECOND: True, THIRD: True}
        table = await shell(shared_vm, "dmsetup table")
        assert f" verity 1 8:0 8:0 4096 4096 {image.size // 4096} " in table
        assert image.root_hash in table
        await mount.release()
        assert await shell(shared_vm, "ls /dev/mapper; ls -A /run/mounts 2> /dev/null || :") in (
            "control\n",
            "control\nscsi\n",
        )
        assert (await look(shared_vm)).mapped == before.mapped

    @each
    async def test_data_that_was_changed_cannot_be_read(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path, filesystem: str, gap: int
    ) -> None:
        """One bit of one file is an error for it; the others are as they were."""
        image = verified.made(tmp_path / "disk.raw", filesystem, gap)
        contents.flip(image.path, image.data_of(SECOND))
        mount = await manager.add_virtual_disk(image.path, read_only=True, mount=shown(image))
        assert await read(shared_vm, mount) == {FIRST: True, SECOND: False, THIRD: True}
        done = await shared_vm.run(f"cat {mount.guest_path}/{SECOND} > /dev/null")
        assert "Input/output error" in done.stderr
        await mount.release()

    @each
    async def test_data_under_hashes_that_were_changed_cannot_be_read(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path, filesystem: str, gap: int
    ) -> None:
        """The tree is no more trusted than the data."""
        image = verified.made(tmp_path / "disk.raw", filesystem, gap)
        contents.flip(image.path, image.hash_of(image.data_of(THIRD)) + 5)
        # Named, as to find it out the end of the disk is read, and that may be the third's.
        config = shown(image, filesystem=filesystem)
        mount = await manager.add_virtual_disk(image.path, read_only=True, mount=config)
        found = await read(shared_vm, mount)
        assert (found[FIRST], found[THIRD]) == (True, False)
        await mount.release()


async def test_another_root_hash_is_refused(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """Nothing is mounted, and no mapped device is left."""
    image = verified.made(tmp_path / "disk.raw", "ext4")
    other = verified.made(tmp_path / "other.raw", "ext4")  # the same, but for its salt
    before = await look(shared_vm)
    config = MountConfig(verity=other.root_hash)
    with pytest.raises(BackendError, match="does not fit the root hash"):
        await manager.add_virtual_disk(image.path, read_only=True, mount=config)
    assert await look(shared_vm) == before


async def test_a_changed_top_of_the_tree_is_refused(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """It is what the root hash is of, so not even the first block can be read."""
    image = verified.made(tmp_path / "disk.raw", "erofs")
    contents.flip(image.path, image.top + 7)
    with pytest.raises(BackendError, match="does not fit the root hash"):
        await manager.add_virtual_disk(image.path, read_only=True, mount=shown(image))


async def test_a_disk_without_a_tree_is_refused(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """And so is a place where there is none, and a tree that lies within its own data."""
    image = verified.made(tmp_path / "disk.raw", "ext4")
    plain = disks.ext4(tmp_path / "plain.raw")
    blank = disks.blank(tmp_path / "blank.raw")
    cases = (
        (plain, 0, "no verity header|cannot be read"),
        (blank, 0, "no filesystem whose end is known here"),
        (image.path, image.tree + 4096, "no verity header"),
        (image.path, 1 << 40, "no verity header|cannot be read"),
    )
    for path, offset, words in cases:
        config = MountConfig(verity=Verity(image.root_hash, offset))
        with pytest.raises(BackendError, match=words):
            await manager.add_virtual_disk(path, read_only=True, mount=config)


async def test_blocks_that_are_smaller_than_the_hashed_ones_are_thought_of(
    manager: Manager, tmp_path: Path
) -> None:
    """The kernel says no more than EINVAL of a filesystem that has them."""
    image = verified.made(tmp_path / "disk.raw", "ext4", block=1024)
    with pytest.raises(BackendError, match="one of smaller blocks than the device has"):
        await manager.add_virtual_disk(
            image.path, read_only=True, mount=shown(image, filesystem="ext4")
        )


async def test_a_disk_that_can_be_written_is_not_verified(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """It is refused before anything is touched, and the error says what to do."""
    image = verified.made(tmp_path / "disk.raw", "ext4")
    before = await look(shared_vm)
    with pytest.raises(UnsupportedError, match="read_only=True"):
        await manager.add_virtual_disk(image.path, mount=shown(image))
    assert await look(shared_vm) == before


async def test_a_block_device_is_the_verified_one(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """The link leads to it: as long as the data, and with the same errors; it goes with it."""
    image = verified.made(tmp_path / "disk.raw", "ext4")
    bad = image.data_of(SECOND)
    contents.flip(image.path, bad)
    mount = await manager.add_virtual_disk(
        image.path,
        read_only=True,
        mount=shown(image, block_device=True),
        guest_path="/run/links/verified",
    )
    target = await shell(shared_vm, "readlink /run/links/verified")
    assert target.startswith("/dev/dm-")
    assert await shell(shared_vm, f"blockdev --getsize64 {target}") == f"{image.size}\n"
    good = f"dd if=/run/links/verified bs=4096 count=1 skip={bad // 4096 - 1} of=/dev/null"
    await shell(shared_vm, good)
    done = await shared_vm.run(good.replace(f"{bad // 4096 - 1}", f"{bad // 4096}"))
    assert "Input/output error" in done.stderr
    await mount.release()
    assert (await shared_vm.run("ls -d /run/links")).returncode != 0
    assert await shell(shared_vm, "ls /dev/mapper") == "control\n"
