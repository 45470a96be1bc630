"""Encrypted disks on a real guest: what can be read of them, by whom, and what is left of them.

That a filesystem on blocks which fail until they are written is sound is seen by fsck and
by reading all metadata from the disk; the kernel must not have said a word about it.
"""

from __future__ import annotations

import base64
import contextlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from support import contents, disks, mapped
from support.guest_shell import block_name, mounted_at, note_in, shell
from support.images import IMAGES

from hotlun import BackendError, Manager, MountConfig, Secret, WrongKeyError
from hotlun.agent.encryption import capacity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hotlun.vm import Machine

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = disks.MIB
GIB = 1 << 30
PASSPHRASE = "Correct-Horse.Battery_Staple"
KEY = Secret(PASSPHRASE)


def ephemeral(filesystem: str = "ext4", **more: Any) -> MountConfig:
    """Under a key that nobody keeps."""
    return MountConfig(filesystem=filesystem, ensure_filesystem=True, encrypted=True, **more)


def kept(key: Secret = KEY, **more: Any) -> MountConfig:
    """Under the caller's key."""
    return MountConfig(encrypted=True, key=key, **more)


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_is_left(shared_vm: Machine) -> AsyncIterator[None]:
    """After each test, whatever became of it: no mapped device, key or file that was not there."""
    before = await left(shared_vm)
    assert "hotlun-" not in before
    yield
    assert await left(shared_vm) == before


async def left(vm: Machine) -> str:
    """Where something could be left; the folder for cryptsetup's locks is cryptsetup's."""
    return await shell(
        vm,
        "ls /dev/mapper; dmsetup ls; find /run ! -path /run/cryptsetup | sort; "
        "grep hotlun /proc/keys || :",
    )


@contextlib.asynccontextmanager
async def in_place_of(vm: Machine, program: str, script: str) -> AsyncIterator[None]:
    """Have the agent find a script before a program of the guest's."""
    path = f"/usr/local/sbin/{program}"
    lines = f"cat > {path} <<'END'\n#!/bin/sh\n{script}\nEND"
    await shell(vm, f"mkdir -p /usr/local/sbin\n{lines}\nchmod +x {path}")
    try:
        yield
    finally:
        await shell(vm, f"rm {path}")


class TestSoundness:
    @pytest.mark.parametrize(
        ("filesystem", "size", "label", "options", "in_use"),
        [
            ("ext4", 32 * MIB, "dos", ["noatime", "data=journal"], False),
            ("ext4", 512 * MIB, "", [], True),
            # From 2 GiB on, some of the bitmaps that mkfs leaves unwritten lie far from the start.
            ("ext4", 4 * GIB, "", [], False),
            ("xfs", 512 * MIB, "gpt", ["noatime", "inode64"], True),
            ("btrfs", 512 * MIB, "", ["compress=zstd:1"], True),
        ],
        ids=lambda value: f"{value // MIB}M" if isinstance(value, int) and value > 1 else None,
    )
    async def test_every_block_that_is_read_was_written(
        self,
        shared_vm: Machine,
        manager: Manager,
        tmp_path: Path,
        filesystem: str,
        size: int,
        label: str,
        options: list[str],
        in_use: bool,
    ) -> None:
        """libblkid, fsck and whoever reads all metadata find no fault, when new and when used."""
        path = tmp_path / "disk.raw"
        if label:
            contents.three_partitions(path, label, size)
            start, end = contents.second_partition(size)
        else:
            disks.blank(path, size)
            start, end = 0, size
        before = contents.written(path)
        await mapped.integrity_errors(shared_vm)
        config = ephemeral(filesystem, partition=2 if label else 0, options=options)
        mount = await manager.add_virtual_disk(path, mount=config)
        info = await mounted_at(shared_vm, mount)
        assert info.filesystem == filesystem
        assert {*options} <= info.options | info.super_options
        await shell(shared_vm, f"umount {mount.guest_path}")
        await mapped.check(shared_vm, info.device, filesystem)
        assert await mapped.read_metadata(shared_vm, info.device, filesystem) > 1
        if in_use:
            where = await again(shared_vm, mount.guest_path, info.device)
            await mapped.use_hard(shared_vm, where, 2)
            await shell(shared_vm, f"umount {where}")
            await mapped.check(shared_vm, info.device, filesystem)
        assert await mapped.integrity_errors(shared_vm) == ""
        await mount.release()
        after = contents.written(path)
        assert {at: block for at, block in after.items() if not start <= at < end} == before

    async def test_xfs_is_made_on_what_is_large_enough(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """The smallest disk that has 320 MiB inside works; of a smaller one nothing is lost."""
        needed = 320 * MIB
        smallest = next(
            size for size in range(needed, 2 * needed, 4096) if capacity(size // 512) >= needed
        )
        path = disks.blank(tmp_path / "disk.raw", smallest)
        mount = await manager.add_virtual_disk(path, mount=ephemeral("xfs"))
        device = (await mounted_at(shared_vm, mount)).device
        assert await shell(shared_vm, f"blockdev --getsize64 {device}") == f"{needed}\n"
        await mount.release()
        path = contents.made(tmp_path / "small.raw", "ext4", "here", smallest - 4096)
        before = contents.written(path)
        with pytest.raises(BackendError, match="xfs needs 320 MiB; nothing was written"):
            await manager.add_virtual_disk(path, mount=ephemeral("xfs"))
        assert contents.written(path) == before

    async def test_btrfs_is_refused_where_it_does_not_fit(
        self, manager: Manager, tmp_path: Path
    ) -> None:
        """Before anything is lost."""
        path = contents.made(tmp_path / "small.raw", "ext4", "here", 109 * MIB)
        before = contents.written(path)
        with pytest.raises(BackendError, match="btrfs needs 109 MiB; nothing was written"):
            await manager.add_virtual_disk(path, mount=ephemeral("btrfs"))
        assert contents.written(path) == before


async def again(vm: Machine, path: str | None, device: str) -> str:
    """Mount by hand what was mounted before; gives the path."""
    await shell(vm, f"mount {device} {path}")
    assert path is not None
    return path


class TestAuthenticity:
    @pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
    async def test_what_the_host_changes_cannot_be_read(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path, filesystem: str
    ) -> None:
        """One bit of a file's block is an error for that file, and for no other; release works."""
        path = disks.blank(tmp_path / "disk.raw", contents.SIZES[filesystem])
        mount = await manager.add_virtual_disk(path, mount=ephemeral(filesystem))
        where = mount.guest_path
        await shell(shared_vm, f"echo good > {where}/good; sync")
        before = contents.written(path)
        await shell(shared_vm, f"head -c 1M /dev/urandom > {where}/bad; sync")
        after = contents.written(path)
        changed = sorted(at for at in after if before.get(at) != after[at])
        contents.flip(path, middle_of_longest_run(changed) + 1234)
        await shell(shared_vm, "echo 3 > /proc/sys/vm/drop_caches")
        assert await shell(shared_vm, f"cat {where}/good") == "good\n"
        done = await shared_vm.run(f"cat {where}/bad | wc -c; cat {where}/bad > /dev/null")
        assert "error" in done.stderr
        assert int(done.stdout) < MIB
        assert "INTEGRITY AEAD ERROR" in await mapped.integrity_errors(shared_vm)
        await mount.release()


def middle_of_longest_run(offsets: list[int]) -> int:
    """Of blocks that follow each other: where a file of many lies, and not the marks of it."""
    best, run = offsets[:1], offsets[:1]
    for offset in offsets[1:]:
        run = [*run, offset] if offset == run[-1] + contents.BLOCK else [offset]
        best = max(best, run, key=len)
    assert len(best) >= 64
    return best[len(best) // 2]


_WRITE_DOWN = (
    "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ /proc/keys <&- | tr '\\0' '\\n' >> /tmp/seen"
)
"""What a program that the agent runs could see of other processes, and of keys."""


class TestKeys:
    async def test_a_thrown_away_key_is_nowhere(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """The kernel's table has its name; no argument list, environment or keyring has a key."""
        path = disks.blank(tmp_path / "disk.raw")
        look = f'{_WRITE_DOWN}\nexec /usr/sbin/mkfs.ext4 "$@"'
        async with in_place_of(shared_vm, "mkfs.ext4", look):
            await manager.add_virtual_disk(path, mount=ephemeral())
        table = await shell(shared_vm, "dmsetup table --showkeys")
        assert re.search(r"-crypt: .* :96:logon:hotlun:\S+ 0 ", table)
        seen = await shell(shared_vm, "cat /tmp/seen /proc/keys; rm /tmp/seen")
        assert "mkfs.ext4" in seen
        assert "logon" not in seen
        assert not re.search(r"(?i)\b[0-9a-f]{64,}\b|[0-9a-z+/]{64,}=*", table + seen)

    async def test_each_mount_has_its_own(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """The same disk with the same content is other bytes, and the first are not to be read."""
        path = disks.blank(tmp_path / "disk.raw")
        found = []
        for _ in range(2):
            mount = await manager.add_virtual_disk(path, mount=ephemeral())
            await shell(shared_vm, f"cd {mount.guest_path}; test ! -e n; seq 99999 > n")
            await mount.release()
            found.append(contents.written(path))
        first, second = found
        assert len(second) > 1000
        # What is before that has no key: dm-integrity's header and its empty journal.
        assert [at for at in first if at >= 136 << 10 and first[at] == second.get(at)] == []


class TestFailures:
    async def test_a_mount_that_fails_leaves_nothing(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """Neither an option that is refused nor an mkfs that fails; then the same disk is fine."""
        path = disks.blank(tmp_path / "disk.raw")
        empty = await left(shared_vm)
        with pytest.raises(BackendError, match="nonsense"):
            await manager.add_virtual_disk(path, mount=ephemeral(options=["nonsense"]))
        assert await left(shared_vm) == empty
        async with in_place_of(shared_vm, "mkfs.ext4", "echo no mkfs today; exit 3"):
            with pytest.raises(BackendError, match=r"mkfs.ext4 failed \(3\): no mkfs today"):
                await manager.add_virtual_disk(path, mount=ephemeral())
        assert await left(shared_vm) == empty
        mount = await manager.add_virtual_disk(path, mount=ephemeral())
        await mount.release()

    async def test_layers_that_somebody_left_are_closed(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """Mapped devices over the slot that nobody uses go, and the mount has its own."""
        path = disks.blank(tmp_path / "disk.raw")
        attached = await manager.add_virtual_disk(path)
        name = await settled(shared_vm, manager, path)
        stem = f"hotlun-{attached.controller}-{attached.lun}-p0"
        await shell(
            shared_vm,
            f"dmsetup create {stem}-integrity --table '0 4096 linear /dev/{name} 0'\n"
            f"name=$(dmsetup info -c --noheadings -o blkdevname {stem}-integrity)\n"
            f'dmsetup create {stem}-crypt --table "0 2048 linear /dev/$name 0"',
        )
        mount = await manager.add_virtual_disk(path, mount=ephemeral())
        table = await shell(shared_vm, "dmsetup table")
        assert "linear" not in table
        assert f"{stem}-crypt" in table
        await mount.release()
        await attached.release()

    async def test_a_disk_in_use_is_refused(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """Another mapped device over it is not to be written over; the disk stays as it is."""
        full = contents.made(tmp_path / "full.raw", "ext4", "theirs")
        blank = disks.blank(tmp_path / "blank.raw")
        made = kept(filesystem="ext4", ensure_filesystem=True)
        for path, config in ((full, ephemeral()), (blank, made)):
            before = contents.written(path)
            attached = await manager.add_virtual_disk(path)
            name = await settled(shared_vm, manager, path)
            await shell(shared_vm, f"dmsetup create theirs --table '0 2048 linear /dev/{name} 0'")
            with pytest.raises(BackendError, match="in use"):
                await manager.add_virtual_disk(path, mount=config)
            await shell(shared_vm, "dmsetup remove theirs")
            await attached.release()
            assert contents.written(path) == before

    async def test_preserved_data_is_not_encrypted_over(
        self, manager: Manager, tmp_path: Path
    ) -> None:
        """Whatever is recognised; what was encrypted under a lost key is, too."""
        for number, name in enumerate(("ext4", "swap", "LUKS 2", "LVM", "RAID 1.2", "GPT", "MBR")):
            kind, make = IMAGES[name]
            path = tmp_path / f"{number}.raw"
            make(path)
            before = contents.written(path)
            with pytest.raises(BackendError, match=f"holds {kind}.* to be preserved"):
                await manager.add_virtual_disk(path, mount=ephemeral(preserve_data=True))
            assert contents.written(path) == before
        path = disks.blank(tmp_path / "blank.raw")
        mount = await manager.add_virtual_disk(path, mount=ephemeral(preserve_data=True))
        await mount.release()
        with pytest.raises(BackendError, match=r"holds DM_integrity, .* to be preserved"):
            await manager.add_virtual_disk(path, mount=ephemeral(preserve_data=True))


async def settled(vm: Machine, manager: Manager, path: Path) -> str:
    """The name of an attached disk, once the guest has it."""
    mount = await manager.add_virtual_disk(path, mount=MountConfig(block_device=True))
    name = await block_name(vm, mount)
    await mount.release()
    return name


@pytest.fixture(scope="module")
def empty_volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LUKS volume with nothing in it, whose key costs less to try than the agent's do."""
    path = disks.blank(tmp_path_factory.mktemp("volume") / "volume.raw", 48 * MIB)
    cheap = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    command = ["cryptsetup", "luksFormat", "-q", "--type", "luks2", *cheap, "-d", "-", str(path)]
    subprocess.run(command, input=KEY.reveal(), check=True, capture_output=True)
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def volume(module_vm: Machine, empty_volume: Path) -> Path:
    """A LUKS volume with an ext4 and a note, which the agent has put there; not to be written."""
    config = kept(filesystem="ext4", ensure_filesystem=True)
    async with Manager(module_vm.host, module_vm.guest) as manager:
        mount = await manager.add_virtual_disk(empty_volume, mount=config)
        await shell(module_vm, f"echo kept > {mount.guest_path}/note")
    return empty_volume


class TestUnderTheCallersKey:
    async def test_it_is_made_once_and_opens_again(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """On a blank partition, with the key alone afterwards; its neighbours stay."""
        size = 40 * MIB
        path = contents.three_partitions(tmp_path / "disk.raw", "gpt", size)
        before = contents.written(path)
        config = kept(partition=2, filesystem="ext4", ensure_filesystem=True, preserve_data=True)
        mount = await manager.add_virtual_disk(path, mount=config)
        await shell(shared_vm, f"echo kept > {mount.guest_path}/note")
        await mount.release()
        mount = await manager.add_virtual_disk(path, mount=kept(partition=2))
        assert await note_in(shared_vm, mount) == "kept\n"
        assert (await mounted_at(shared_vm, mount)).device.startswith("/dev/dm-")
        await mount.release()
        start, end = contents.second_partition(size)
        after = contents.written(path)
        assert {at: block for at, block in after.items() if not start <= at < end} == before

    async def test_it_is_kept_where_it_may_be_made(
        self, shared_vm: Machine, manager: Manager, volume: Path, tmp_path: Path
    ) -> None:
        """Under `ensure_filesystem`, volume and filesystem stay as long as they are as asked."""
        path = tmp_path / "volume.raw"
        shutil.copyfile(volume, path)
        config = kept(filesystem="ext4", ensure_filesystem=True)
        mount = await manager.add_virtual_disk(path, mount=config)
        assert await note_in(shared_vm, mount) == "kept\n"
        await mount.release()

    async def test_another_key_opens_nothing(
        self, shared_vm: Machine, manager: Manager, volume: Path
    ) -> None:
        """It is an error of its own, under `ensure_filesystem` too, and no byte changes."""
        before, empty = contents.written(volume), await left(shared_vm)
        wrong = Secret(PASSPHRASE.lower())
        for config in (kept(wrong), kept(wrong, filesystem="ext4", ensure_filesystem=True)):
            with pytest.raises(WrongKeyError, match="this key does not open") as caught:
                await manager.add_virtual_disk(volume, mount=config)
            assert PASSPHRASE.lower() not in str(caught.value)
            assert await left(shared_vm) == empty
        assert contents.written(volume) == before

    async def test_it_opens_read_only(
        self, shared_vm: Machine, manager: Manager, volume: Path
    ) -> None:
        """From a disk that cannot be written, all the way up."""
        before = contents.written(volume)
        mount = await manager.add_virtual_disk(volume, read_only=True, mount=kept())
        info = await mounted_at(shared_vm, mount)
        assert "ro" in info.options & info.super_options
        assert await shell(shared_vm, f"blockdev --getro {info.device}") == "1\n"
        assert await note_in(shared_vm, mount) == "kept\n"
        await mount.release()
        assert contents.written(volume) == before

    async def test_what_is_inside_can_be_preserved(
        self, shared_vm: Machine, manager: Manager, volume: Path, tmp_path: Path
    ) -> None:
        """Another filesystem in the volume is refused by its name, and stays."""
        path = tmp_path / "volume.raw"
        shutil.copyfile(volume, path)
        config = kept(filesystem="btrfs", ensure_filesystem=True, preserve_data=True)
        with pytest.raises(BackendError, match=r"holds ext4, .* to be preserved"):
            await manager.add_virtual_disk(path, mount=config)
        mount = await manager.add_virtual_disk(path, mount=kept())
        assert await note_in(shared_vm, mount) == "kept\n"
        await mount.release()

    async def test_it_is_made_on_a_blank_disk_alone(self, manager: Manager, tmp_path: Path) -> None:
        """And only if that was asked for, and the disk can be written."""
        ensured = kept(filesystem="ext4", ensure_filesystem=True)
        cases = (
            ("blank", kept(), False, "no LUKS volume; one is made if a filesystem is ensured"),
            ("blank", ensured, True, "read-only and blank"),
            ("ext4", kept(), False, "holds ext4 and no LUKS volume"),
            ("ext4", ensured, False, "a new one is made on a blank disk alone"),
            ("LVM", ensured, False, "holds LVM2_member and no LUKS volume"),
        )
        for number, (image, config, read_only, words) in enumerate(cases):
            path = tmp_path / f"{number}.raw"
            IMAGES[image][1](path)
            before = contents.written(path)
            with pytest.raises(BackendError, match=words):
                await manager.add_virtual_disk(path, read_only=read_only, mount=config)
            assert contents.written(path) == before

    async def test_the_key_is_nowhere(
        self, shared_vm: Machine, manager: Manager, volume: Path
    ) -> None:
        """In no argument list, environment, file, log or error; nor as the bridge carried it."""
        look = f'{_WRITE_DOWN}\nexec /usr/sbin/cryptsetup "$@"'
        async with in_place_of(shared_vm, "cryptsetup", look):
            mount = await manager.add_virtual_disk(volume, read_only=True, mount=kept())
            shown = f"{mount!r} {await shell(shared_vm, 'dmsetup table --showkeys')}"
            await mount.release()
            wrong = kept(Secret(PASSPHRASE + "?"))
            with pytest.raises(WrongKeyError) as caught:
                await manager.add_virtual_disk(volume, read_only=True, mount=wrong)
        seen = await shell(
            shared_vm,
            "cat /tmp/seen; dmesg; rm /tmp/seen; "
            "find /run /tmp /var /etc /root -xdev -type f -size -1M | xargs cat",
        )
        assert "--key-file" in seen
        seen += Path(shared_vm.qmp_socket).with_name("console.log").read_text(errors="replace")
        seen += f"{shown} {caught.value!r} {caught.value}"
        carried = base64.b64encode(PASSPHRASE.encode()).decode()
        assert PASSPHRASE not in seen
        assert carried.rstrip("=")[:-1] not in seen
        assert PASSPHRASE.encode() not in volume.read_bytes()
