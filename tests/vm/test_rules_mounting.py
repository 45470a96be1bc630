"""What a mount is, seen from inside the guest: formats, filesystems, options, paths, identity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support import disks
from support.guest_shell import block_name, mounted_at, note_in, shell
from support.machine import look, mounted

from hotlun import GuestPathConflictError, Manager, MountConfig

if TYPE_CHECKING:
    from pathlib import Path

    from hotlun.vm import Machine

pytestmark = pytest.mark.asyncio(loop_scope="module")

FORMATS_EXT4 = MountConfig(filesystem="ext4", ensure_filesystem=True)
FORMATS_XFS = MountConfig(filesystem="xfs", ensure_filesystem=True)


class TestFormats:
    @pytest.mark.parametrize(
        ("suffix", "made_as", "options"),
        [
            ("raw", "raw", []),
            ("qcow2", "qcow2", []),
            ("vhd", "vpc", ["subformat=fixed"]),
            ("vhd", "vpc", ["subformat=dynamic"]),
            ("vhdx", "vhdx", []),
        ],
    )
    async def test_each_keeps_what_the_guest_wrote(
        self,
        shared_vm: Machine,
        manager: Manager,
        tmp_path: Path,
        suffix: str,
        made_as: str,
        options: list[str],
    ) -> None:
        """Formatted and written once, released, attached again: it is there, not formatted anew."""
        path = disks.image(tmp_path / f"disk.{suffix}", made_as, *options)
        mount = await manager.add_virtual_disk(path, mount=FORMATS_EXT4)
        assert (await mounted_at(shared_vm, mount)).filesystem == "ext4"
        await shell(shared_vm, f"seq 100000 > {mount.guest_path}/numbers")
        written = await shell(shared_vm, "seq 100000 | md5sum")
        await mount.release()
        disks.check(path, made_as)
        mount = await manager.add_virtual_disk(path, mount=FORMATS_EXT4, guest_path="/mnt/again")
        seen = await look(shared_vm)
        drivers = await shared_vm.query("query-named-block-nodes", {"flat": True})
        assert isinstance(drivers, list)
        (driver,) = (n["drv"] for n in drivers if n["node-name"] == f"hotlun-{mount.serial}")
        assert driver == made_as
        assert seen.mount_at("/mnt/again") is not None
        assert await shell(shared_vm, "md5sum < /mnt/again/numbers") == written


class TestFilesystems:
    async def test_xfs_keeps_what_the_guest_wrote(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """An xfs is made once, and found the second time."""
        path = disks.blank(tmp_path / "disk.raw", 320 * disks.MIB)
        mount = await manager.add_virtual_disk(path, mount=FORMATS_XFS)
        assert (await mounted_at(shared_vm, mount)).filesystem == "xfs"
        await shell(shared_vm, f"echo kept > {mount.guest_path}/note")
        await mount.release()
        mount = await manager.add_virtual_disk(path, mount=FORMATS_XFS)
        assert await note_in(shared_vm, mount) == "kept\n"

    async def test_what_is_there_is_mounted_without_being_told(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """Without `filesystem`, the guest finds out."""
        for path in (disks.ext4(tmp_path / "ext4.raw"), disks.xfs(tmp_path / "xfs.raw")):
            mount = await manager.add_virtual_disk(path, mount=MountConfig())
            assert (await mounted_at(shared_vm, mount)).filesystem == path.stem

    @pytest.mark.parametrize("label", ["gpt", "dos"])
    async def test_partitions(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path, label: str
    ) -> None:
        """Two partitions of one disk are two guest mounts of one attachment."""
        path = disks.partitioned(tmp_path / "disk.raw", label, {1: "first", 2: "second"})
        one = await manager.add_virtual_disk(path, mount=MountConfig(partition=1))
        two = await manager.add_virtual_disk(path, mount=MountConfig(partition=2))
        assert one.slot == two.slot
        name = await block_name(shared_vm, one)
        for number, mount, note in ((1, one, "first"), (2, two, "second")):
            assert (await mounted_at(shared_vm, mount)).device == f"/dev/{name}{number}"
            assert await note_in(shared_vm, mount) == note
        assert len((await look(shared_vm)).scsi) == 1
        await one.release()
        assert await note_in(shared_vm, two) == "second"

    async def test_a_partition_is_formatted_alone(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """`ensure_filesystem` on an empty partition leaves its neighbour as it is."""
        path = disks.partitioned(tmp_path / "disk.raw", "gpt", {1: "first", 3: "third"})
        config = MountConfig(partition=2, filesystem="ext4", ensure_filesystem=True)
        await manager.add_virtual_disk(path, mount=config, guest_path="/mnt/new")
        assert await shell(shared_vm, "ls /mnt/new") == "lost+found\n"
        for number, note in ((1, "first"), (3, "third")):
            mount = await manager.add_virtual_disk(path, mount=MountConfig(partition=number))
            assert await note_in(shared_vm, mount) == note


class TestReadOnly:
    @pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
    async def test_goes_all_the_way_down(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path, filesystem: str
    ) -> None:
        """The mount, the kernel's device and QEMU's node are read-only; the file is not touched."""
        path = getattr(disks, filesystem)(tmp_path / "disk.raw")
        before = disks.digest(path)
        mount = await manager.add_virtual_disk(path, read_only=True, mount=MountConfig())
        info = await mounted_at(shared_vm, mount)
        assert "ro" in info.options & info.super_options
        name = await block_name(shared_vm, mount)
        assert await shell(shared_vm, f"cat /sys/block/{name}/ro") == "1\n"
        nodes = await shared_vm.query("query-named-block-nodes", {"flat": True})
        assert isinstance(nodes, list)
        assert all(node["ro"] for node in nodes if node["node-name"].startswith("hotlun-"))
        for command in (f"touch {mount.guest_path}/x", f"dd if=/dev/zero of=/dev/{name} count=1"):
            done = await shared_vm.run(command)
            assert done.returncode != 0
        await mount.release()
        assert disks.digest(path) == before

    async def test_a_journal_is_not_replayed(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """A filesystem that was not unmounted can be read from a disk that cannot be written."""
        path = disks.never_unmounted(disks.ext4(tmp_path / "disk.raw", "here"))
        mount = await manager.add_virtual_disk(path, read_only=True, mount=MountConfig())
        assert await note_in(shared_vm, mount) == "here"
        assert "norecovery" in (await mounted_at(shared_vm, mount)).super_options


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "on_mount", "on_filesystem"),
        [
            (["noatime", "nosuid", "nodev"], {"rw", "noatime", "nosuid", "nodev"}, set()),
            (["noexec", "nodiratime"], {"noexec", "nodiratime"}, set()),
            (["ro"], {"ro"}, set()),
            (["data=ordered", "commit=17", "noatime"], {"noatime"}, {"commit=17"}),
            (["data=journal"], set(), {"data=journal"}),
            (["sync", "lazytime"], set(), {"sync", "lazytime"}),
        ],
        ids=lambda words: ",".join(sorted(words)),
    )
    async def test_are_the_mounts(
        self,
        shared_vm: Machine,
        manager: Manager,
        tmp_path: Path,
        options: list[str],
        on_mount: set[str],
        on_filesystem: set[str],
    ) -> None:
        """Flags are on the mount, the filesystem's own words on the filesystem."""
        path = disks.ext4(tmp_path / "disk.raw")
        mount = await manager.add_virtual_disk(path, mount=MountConfig(options=options))
        info = await mounted_at(shared_vm, mount)
        assert info.options >= on_mount
        assert info.super_options >= on_filesystem

    @pytest.mark.parametrize(
        ("option", "propagation"),
        [("shared", "shared"), ("rshared", "shared"), ("unbindable", "unbindable")],
    )
    async def test_propagation_is_set(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path, option: str, propagation: str
    ) -> None:
        """What is mounted below is seen elsewhere, or not, as was asked."""
        path = disks.ext4(tmp_path / "disk.raw")
        config = MountConfig(options=[option, "noatime"])
        mount = await manager.add_virtual_disk(path, mount=config)
        info = await mounted_at(shared_vm, mount)
        assert info.propagation == (propagation,)
        assert "noatime" in info.options

    async def test_private_below_a_shared_mount(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """Propagation that the parent would pass on is taken off again."""
        await shell(shared_vm, "mkdir -p /mnt/s && mount -t tmpfs --make-shared tmpfs /mnt/s")
        configs = {"/mnt/s/rp": ["rprivate"], "/mnt/s/none": []}
        for number, (guest_path, options) in enumerate(configs.items()):
            await manager.add_virtual_disk(
                disks.ext4(tmp_path / f"{number}.raw"),
                mount=MountConfig(options=options),
                guest_path=guest_path,
            )
        found = {path: await mounted(shared_vm, path) for path in configs}
        tags = {path: info.propagation for path, info in found.items() if info}
        assert tags == {"/mnt/s/rp": (), "/mnt/s/none": ("shared",)}
        await manager.release_all()
        await shell(shared_vm, "umount /mnt/s")


class TestWithoutAMount:
    async def test_a_block_device_is_a_link(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """The guest path leads to the device, which reads and writes; then it is gone."""
        path = disks.blank(tmp_path / "disk.raw")
        mount = await manager.add_virtual_disk(
            path, mount=MountConfig(block_device=True), guest_path="/run/links/device"
        )
        name = await block_name(shared_vm, mount)
        assert await shell(shared_vm, "readlink /run/links/device") == f"/dev/{name}\n"
        await shell(shared_vm, "echo written | dd of=/run/links/device conv=fsync")
        assert await mounted(shared_vm, "/run/links/device") is None
        await mount.release()
        assert (await shared_vm.run("ls -d /run/links/device")).returncode != 0
        with path.open("rb") as file:
            assert file.read(8) == b"written\n"

    async def test_a_partition_as_a_block_device(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """The link is to the partition's device."""
        path = disks.partitioned(tmp_path / "disk.raw", "gpt", {2: "second"})
        config = MountConfig(partition=2, block_device=True)
        mount = await manager.add_virtual_disk(path, mount=config)
        target = await shell(shared_vm, f"readlink {mount.guest_path}")
        assert target == f"/dev/{await block_name(shared_vm, mount)}2\n"

    async def test_attached_only(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """Without `mount` the disk is in the VM, and nothing is mounted."""
        before = await look(shared_vm)
        mount = await manager.add_virtual_disk(disks.ext4(tmp_path / "disk.raw"))
        assert mount.guest_path is None
        await shell(shared_vm, f"until ls /sys/bus/scsi/devices/?:0:0:{mount.lun}; do :; done")
        seen = await look(shared_vm)
        assert seen.mounts == before.mounts
        assert [(d.controller, d.lun) for d in seen.scsi] == [(0, 0)]


class TestPaths:
    async def test_generated_ones_are_the_lowest_free(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """m0, m1, m2; and the first one that was given back."""
        paths = [disks.ext4(tmp_path / f"{number}.raw", str(number)) for number in range(4)]
        mounts = [await manager.add_virtual_disk(p, mount=MountConfig()) for p in paths[:3]]
        assert [m.guest_path for m in mounts] == [f"/run/mounts/scsi/m{n}" for n in range(3)]
        await mounts[1].release()
        last = await manager.add_virtual_disk(paths[3], mount=MountConfig())
        assert last.guest_path == "/run/mounts/scsi/m1"
        assert await note_in(shared_vm, last) == "3"

    async def test_stated_ones_are_normalised_and_made(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """Directories that are missing are made; odd characters are characters."""
        path = disks.ext4(tmp_path / "disk.raw", "there")
        mount = await manager.add_virtual_disk(
            path, mount=MountConfig(), guest_path="//mnt/./a b/\u00fc\\040\n/x/"
        )
        assert mount.guest_path == "/mnt/a b/\u00fc\\040\n/x"
        assert await note_in(shared_vm, mount) == "there"
        assert (await mounted_at(shared_vm, mount)).filesystem == "ext4"

    async def test_a_directory_that_was_there_stays(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """What a mount covered is uncovered by its release, files and all."""
        await shell(shared_vm, "mkdir -p /data/full /data/empty && echo mine > /data/full/file")
        for number, guest_path in enumerate(("/data/full", "/data/empty")):
            mount = await manager.add_virtual_disk(
                disks.ext4(tmp_path / f"{number}.raw"),
                mount=MountConfig(),
                guest_path=guest_path,
            )
            await mount.release()
        assert await shell(shared_vm, "cd /data && ls && cat full/file") == "empty\nfull\nmine\n"

    async def test_a_directory_that_was_made_goes(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """The generated path's directory is not there after the release."""
        mount = await manager.add_virtual_disk(
            disks.ext4(tmp_path / "disk.raw"), mount=MountConfig()
        )
        await mount.release()
        assert (await shared_vm.run(f"ls -d {mount.guest_path}")).returncode != 0

    async def test_one_above_or_below_another_is_refused(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """Guest paths never collide, and a refusal touches nothing."""
        await manager.add_virtual_disk(
            disks.ext4(tmp_path / "0.raw"), mount=MountConfig(), guest_path="/mnt/a/b"
        )
        before = await look(shared_vm)
        other = disks.ext4(tmp_path / "1.raw")
        for guest_path in ("/mnt/a", "/mnt/a/b", "/mnt/a/b/c"):
            with pytest.raises(GuestPathConflictError, match="/mnt/a"):
                await manager.add_virtual_disk(other, mount=MountConfig(), guest_path=guest_path)
        assert await look(shared_vm) == before


async def test_the_serial_is_what_the_guest_reads(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """VPD page 0x80 has it, for any program in the guest."""
    mount = await manager.add_virtual_disk(disks.ext4(tmp_path / "disk.raw"), mount=MountConfig())
    name = await block_name(shared_vm, mount)
    page = await shell(shared_vm, f"tail -c +5 /sys/block/{name}/device/vpd_pg80")
    assert page == mount.serial
    page = await shell(shared_vm, f"grep -c {mount.serial} /sys/block/{name}/device/vpd_pg83")
    assert page == "1\n"
