"""Disks mounted, linked and unmounted by the real kernel; a loop device is the disk."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import struct
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support.guest import FakeGuest, image_of, loop_disk
from support.mounted import mounted_at, mounts, options_at, unmount_all

from hotlun.agent import options, superblocks, syscalls
from hotlun.agent.errors import RequestError
from hotlun.agent.settings import DiskSettings
from hotlun.bridge.documents import Fields

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="loop devices and mount(2) need root"),
]

EXT4 = ("mkfs.ext4", "-F", "-q")


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    guest = FakeGuest(tmp_path / "guest", real_devices=True)
    yield guest
    unmount_all(tmp_path)
    guest.close()


@pytest.fixture
def ext4(guest: FakeGuest, tmp_path: Path) -> Iterator[str]:
    """A disk at 0:1 with an ext4 on it."""
    with loop_disk(guest, 1, image_of(tmp_path / "ext4.img", 16, *EXT4)) as node:
        yield node
        with contextlib.suppress(FileNotFoundError):
            unmount_all(tmp_path)


@pytest.fixture
def blank(guest: FakeGuest, tmp_path: Path) -> Iterator[str]:
    """A disk at 0:2 with nothing on it."""
    with loop_disk(guest, 2, image_of(tmp_path / "blank.img", 16)) as node:
        yield node
        unmount_all(tmp_path)


def settings(path: Path | str, lun: int = 1, *, adding: bool = True, **more: Any) -> DiskSettings:
    return DiskSettings.read(Fields({"MountPath": str(path), "Lun": lun, **more}), adding=adding)


def add(guest: FakeGuest, path: Path | str, lun: int = 1, **more: Any) -> None:
    guest.disks.mount(settings(path, lun, **more), lambda: True)


def remove(guest: FakeGuest, path: Path | str, lun: int = 1, **more: Any) -> None:
    guest.disks.unmount(settings(path, lun, adding=False, **more))


def test_a_disk_is_mounted_and_unmounted(guest: FakeGuest, ext4: str, tmp_path: Path) -> None:
    """As what it holds, in a directory made for it, which goes with it."""
    path = tmp_path / "run/scsi/m0"
    add(guest, path)
    assert mounted_at(path) == [("ext4", ext4)]
    assert path.parent.stat().st_mode & 0o777 == 0o700
    remove(guest, path)
    assert mounted_at(path) == []
    assert not path.exists()


def test_unmounting_again_is_success(guest: FakeGuest, ext4: str, tmp_path: Path) -> None:
    """Also with the disk gone, and for a disk that never was."""
    path = tmp_path / "m0"
    add(guest, path)
    remove(guest, path)
    remove(guest, path)
    remove(guest, path, lun=9)


def test_without_a_path_only_the_device_is_waited_for(guest: FakeGuest, ext4: str) -> None:
    """As the original agent does."""
    before = mounts()
    add(guest, "")
    remove(guest, "")
    assert mounts() == before


def test_options_reach_the_kernel(guest: FakeGuest, ext4: str, tmp_path: Path) -> None:
    """Flags, data and propagation."""
    path = tmp_path / "m0"
    words = ["noatime", "nosuid", "data=journal", "commit=77", "rshared", "noexec", "nodev"]
    add(guest, path, Options=words)
    assert {"noatime", "nosuid", "nodev", "noexec", "data=journal", "commit=77", "rw"} <= (
        options_at(path)
    )
    assert any(option.startswith("shared:") for option in options_at(path))


def test_a_read_only_disk_is_mounted_without_recovery(
    guest: FakeGuest, ext4: str, tmp_path: Path
) -> None:
    """Whatever the words say."""
    path = tmp_path / "m0"
    add(guest, path, ReadOnly=True, Options=["rw"])
    assert {"ro", "norecovery"} <= options_at(path)
    assert "rw" not in options_at(path)


def test_read_only_beside_writable(guest: FakeGuest, ext4: str, tmp_path: Path) -> None:
    """One filesystem, two mounts: `ro` holds for the one that asked for it."""
    add(guest, tmp_path / "m0")
    add(guest, tmp_path / "m1", Options=["ro", "nosuid"])
    (tmp_path / "m0/file").write_text("seen by both")
    assert (tmp_path / "m1/file").read_text() == "seen by both"
    with pytest.raises(OSError, match="Read-only"):
        (tmp_path / "m1/other").write_text("")
    assert {"ro", "nosuid"} <= options_at(tmp_path / "m1")
    assert "nosuid" not in options_at(tmp_path / "m0")


def test_writable_beside_read_only_is_refused(guest: FakeGuest, ext4: str, tmp_path: Path) -> None:
    """The first one's filesystem was mounted not to be written."""
    add(guest, tmp_path / "m0", Options=["ro"])
    with pytest.raises(RequestError, match="mounted elsewhere read-only"):
        add(guest, tmp_path / "m1")
    assert not (tmp_path / "m1").exists()


def test_a_path_in_use_is_refused(guest: FakeGuest, ext4: str, blank: str, tmp_path: Path) -> None:
    """By another disk, and by the same one as something else; what is there is named and stays."""
    path = tmp_path / "m0"
    add(guest, path)
    with pytest.raises(RequestError, match=f"{path} is in use: {ext4} is mounted there$"):
        add(guest, path, 2, Filesystem="ext4")
    with pytest.raises(RequestError, match=f"{path} is in use: {ext4} .* not as asked for"):
        add(guest, path, Options=["ro"])
    assert mounted_at(path) == [("ext4", ext4)]
    assert "rw" in options_at(path)


def test_the_same_again_is_success(guest: FakeGuest, ext4: str, tmp_path: Path) -> None:
    """The host may not have had the answer; nothing is done twice."""
    path = tmp_path / "m0"
    for _ in range(3):
        add(guest, path, Options=["noatime"])
    assert mounted_at(path) == [("ext4", ext4)]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_path_that_is_no_directory_is_refused(
    guest: FakeGuest, ext4: str, tmp_path: Path, kind: str
) -> None:
    """It stays what it is."""
    path = tmp_path / "m0"
    if kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to(tmp_path)
    with pytest.raises(RequestError, match="no directory"):
        add(guest, path)
    assert path.is_symlink() or path.read_text() == "mine"


def test_a_directory_below_a_file_cannot_be_made(
    guest: FakeGuest, ext4: str, tmp_path: Path
) -> None:
    """The words name the directory."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=f"{tmp_path}/file exists already and is no dir"):
        add(guest, tmp_path / "file/m0")


def test_a_failed_mount_leaves_nothing(guest: FakeGuest, ext4: str, tmp_path: Path) -> None:
    """The directories that it made are gone, the one that was there is not."""
    (tmp_path / "here").mkdir()
    with pytest.raises(RequestError, match=r"loop\d+\) cannot be mounted at .*: ext4: Unknown"):
        add(guest, tmp_path / "here/run/m0", Options=["nonsense=1"])
    assert list((tmp_path / "here").iterdir()) == []


def test_a_failed_late_step_unmounts_first(
    guest: FakeGuest, ext4: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk's files are not in the way of the directory's removal."""
    real = syscalls.mount

    def mount(source: str, target: str, filesystem: str, flags: int, data: str = "") -> None:
        if not source:
            raise OSError(1, "Operation not permitted", target)
        real(source, target, filesystem, flags, data)

    path = tmp_path / "m0"
    add(guest, path)
    (path / "precious").write_text("still here")
    remove(guest, path)
    with monkeypatch.context() as patch, pytest.raises(RequestError, match="not permitted"):
        patch.setattr(syscalls, "mount", mount)
        add(guest, path, Options=["shared"])
    assert not path.exists()
    add(guest, path)
    assert (path / "precious").read_text() == "still here"


def test_a_directory_that_was_there_stays(guest: FakeGuest, ext4: str, tmp_path: Path) -> None:
    """Whether it is empty or not: only what was made here goes."""
    for path in (tmp_path / "empty", tmp_path / "full"):
        path.mkdir()
    (tmp_path / "full/file").write_text("mine")
    for path in (tmp_path / "empty", tmp_path / "full"):
        add(guest, path)
        remove(guest, path)
    assert (tmp_path / "empty").is_dir()
    assert (tmp_path / "full/file").read_text() == "mine"


def test_unmounting_a_path_never_mounted_removes_nothing(
    guest: FakeGuest, ext4: str, tmp_path: Path
) -> None:
    """The original agent deletes it with all its contents."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    remove(guest, tmp_path / "mine")
    assert (tmp_path / "mine/file").read_text() == "mine"


def test_another_disks_mount_is_left_alone(
    guest: FakeGuest, ext4: str, blank: str, tmp_path: Path
) -> None:
    """Nothing of the disk is there, so there is nothing to undo."""
    path = tmp_path / "m0"
    add(guest, path)
    remove(guest, path, lun=2)
    remove(guest, path, lun=9)
    assert mounted_at(path) == [("ext4", ext4)]


@pytest.mark.parametrize("below", [False, True])
def test_a_dead_mount_goes_though_its_slot_has_another_disk(
    guest: FakeGuest, ext4: str, tmp_path: Path, below: bool
) -> None:
    """The path is free for the new one then. Out of sight, it is told of what covers it."""
    path = tmp_path / "m0"
    add(guest, path)
    for number in (guest.sys / "dev/block").iterdir():
        number.unlink()
    guest.remove_disk(1)
    with loop_disk(guest, 1, image_of(tmp_path / "new.img", 16, *EXT4)) as new:
        with pytest.raises(RequestError, match=f"{path} is in use: {ext4} is mounted there"):
            add(guest, path)
        if below:
            syscalls.mount("cover", str(path), "tmpfs", 0)
            with pytest.raises(RequestError, match=f"cover is mounted at {path}, on top of"):
                remove(guest, path)
            syscalls.unmount(str(path))
        remove(guest, path)
        assert mounted_at(path) == []
        assert not path.exists()
        add(guest, path)
        assert mounted_at(path) == [("ext4", new)]
        remove(guest, path)


def test_a_mount_below_anothers_is_refused(guest: FakeGuest, ext4: str, tmp_path: Path) -> None:
    """It is there and cannot be unmounted; the words say what is in the way."""
    path = tmp_path / "m0"
    add(guest, path)
    syscalls.mount("cover", str(path), "tmpfs", 0)
    with pytest.raises(RequestError, match=f"cover is mounted at {path}, on top of disk 0:1"):
        remove(guest, path)
    assert mounted_at(path) == [("ext4", ext4), ("tmpfs", "cover")]
    syscalls.unmount(str(path))
    remove(guest, path)


def test_stacked_mounts_of_the_disk_are_all_unmounted(
    guest: FakeGuest, ext4: str, tmp_path: Path
) -> None:
    """Somebody mounted it there once more."""
    path = tmp_path / "m0"
    add(guest, path)
    syscalls.mount(str(path), str(path), "", options.MS_BIND)
    remove(guest, path)
    assert mounted_at(path) == []
    assert not path.exists()


def test_a_busy_mount_names_who_keeps_it(guest: FakeGuest, ext4: str, tmp_path: Path) -> None:
    """An open file, a process's directory, another mount on it."""
    path = tmp_path / "m0"
    add(guest, path)
    (path / "file").write_text("")
    process = subprocess.Popen(["sleep", "60"], cwd=path)
    try:
        with (path / "file").open(), pytest.raises(RequestError) as caught:
            remove(guest, path)
        assert f"an open file of process {os.getpid()} (" in str(caught.value)
        assert f"the directory of process {process.pid} (sleep)" in str(caught.value)
    finally:
        process.kill()
        process.wait()
    (path / "below").mkdir()
    syscalls.mount("none", str(path / "below"), "tmpfs", 0)
    with pytest.raises(RequestError, match=f"{path}/below is mounted on it"):
        remove(guest, path)
    assert mounted_at(path) == [("ext4", ext4)]


def test_a_mounted_disk_is_not_unplugged(guest: FakeGuest, ext4: str, tmp_path: Path) -> None:
    """The kernel's own word that it is held comes first, and then who holds it."""
    add(guest, tmp_path / "m0")
    with pytest.raises(RequestError, match=rf"is in use: loop\d+ is mounted at {tmp_path}/m0"):
        guest.disks.unplug(settings("", 1).slot)
    assert (guest.sysfs(1) / "delete").read_text() == ""


def test_without_descriptors_nothing_is_called_gone(
    guest: FakeGuest, ext4: str, tmp_path: Path
) -> None:
    """An agent that can look at nothing says so, not that there is nothing."""
    add(guest, tmp_path / "m0")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as held:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        with contextlib.suppress(OSError):
            while True:
                held.callback(os.close, os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(OSError, match="Too many open files"):
            remove(guest, tmp_path / "m0")
        with pytest.raises(OSError, match="Too many open files"):
            guest.disks.unplug(settings("", 1).slot)
    assert mounted_at(tmp_path / "m0") == [("ext4", ext4)]
    assert (guest.sysfs(1) / "delete").read_text() == ""


def test_a_disk_opened_for_one_alone_is_not_unplugged(guest: FakeGuest, ext4: str) -> None:
    """Though nothing shows who that is."""
    mine = os.open(ext4, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(RequestError, match="something in the kernel, or a process"):
            guest.disks.unplug(settings("", 1).slot)
    finally:
        os.close(mine)


def test_paths_with_odd_characters(guest: FakeGuest, ext4: str, tmp_path: Path) -> None:
    """Blanks, backslashes, line ends and letters of all kinds are as good as others."""
    path = tmp_path / "a b\\c\nd#\u00e9\u2028e\x0cf"
    add(guest, path)
    add(guest, path)
    assert mounted_at(path) == [("ext4", ext4)]
    remove(guest, path)
    assert not path.exists()


def test_a_link_in_the_path_is_followed(guest: FakeGuest, ext4: str, tmp_path: Path) -> None:
    """Mounting and unmounting mean the same place."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    add(guest, tmp_path / "link/m0")
    assert mounted_at(tmp_path / "real/m0") == [("ext4", ext4)]
    remove(guest, tmp_path / "link/m0")
    assert mounted_at(tmp_path / "real/m0") == []


def test_a_block_device_is_a_link(guest: FakeGuest, blank: str, tmp_path: Path) -> None:
    """It comes and goes, and nothing is mounted."""
    path = tmp_path / "dev/disk"
    add(guest, path, 2, BlockDev=True)
    add(guest, path, 2, BlockDev=True)
    assert os.readlink(path) == blank
    remove(guest, path, 2, BlockDev=True)
    assert not path.parent.exists()
    remove(guest, path, 2, BlockDev=True)


def test_a_link_to_something_else_is_left_alone(
    guest: FakeGuest, blank: str, tmp_path: Path
) -> None:
    """So is what is no link at all; a link to a node that is gone is removed."""
    path = tmp_path / "disk"
    path.symlink_to("/dev/null")
    remove(guest, path, 2, BlockDev=True)
    assert path.is_symlink()
    path.unlink()
    path.write_text("mine")
    remove(guest, path, 2, BlockDev=True)
    assert path.read_text() == "mine"
    path.unlink()
    path.symlink_to("/dev/sd-gone")
    remove(guest, path, 9, BlockDev=True)
    assert not path.is_symlink()


def test_a_partition_is_mounted(guest: FakeGuest, tmp_path: Path) -> None:
    """By its number; one that is not there is told of, with those that are."""
    image = image_of(tmp_path / "parts.img", 32)
    extents = [(2048, 24576), (26624, 24576)]
    with image.open("r+b") as file:
        file.seek(446)
        for extent in extents:
            file.write(bytes((0, 0, 0, 0, 0x83, 0, 0, 0)) + struct.pack("<II", *extent))
        file.seek(510)
        file.write(b"\x55\xaa")
    with loop_disk(guest, 1, image, extents) as node:
        subprocess.run([*EXT4, f"{node}p2"], check=True)
        add(guest, tmp_path / "m0", Partition=2)
        assert mounted_at(tmp_path / "m0") == [("ext4", f"{node}p2")]
        with pytest.raises(RequestError, match=r"loop\d+p1\) holds no filesystem"):
            add(guest, tmp_path / "m1", Partition=1)
        with pytest.raises(RequestError, match="a partition table; say which"):
            add(guest, tmp_path / "m1")
        with pytest.raises(RequestError, match=r"no partition 3; it has loop\d+p1, loop\d+p2"):
            add(guest, tmp_path / "m1", Partition=3)
        with pytest.raises(RequestError, match="not formatted"):
            add(guest, tmp_path / "m1", EnsureFilesystem=True, Filesystem="ext4")
        remove(guest, tmp_path / "m0", Partition=1)
        assert mounted_at(tmp_path / "m0") == [("ext4", f"{node}p2")]
        remove(guest, tmp_path / "m0", Partition=2)


def test_a_blank_disk_is_formatted_once(guest: FakeGuest, blank: str, tmp_path: Path) -> None:
    """What was written is there the next time."""
    path = tmp_path / "m0"
    for turn in range(2):
        add(guest, path, 2, EnsureFilesystem=True, Filesystem="ext4")
        assert (path / "file").exists() == bool(turn)
        (path / "file").write_text("kept")
        remove(guest, path, 2)


def test_an_xfs_is_not_made_again(guest: FakeGuest, tmp_path: Path) -> None:
    """The original agent does not know one when it sees it."""
    if shutil.which("mkfs.xfs") is None or not syscalls.knows_filesystem("xfs"):
        pytest.skip("no xfs here: neither mkfs.xfs nor the kernel's may be missing")
    path = tmp_path / "m0"
    with loop_disk(guest, 1, image_of(tmp_path / "xfs.img", 320)):
        for turn in range(2):
            add(guest, path, EnsureFilesystem=True, Filesystem="xfs")
            assert (path / "file").exists() == bool(turn)
            (path / "file").write_text("kept")
            remove(guest, path)
        add(guest, path, ReadOnly=True)
        assert "norecovery" in options_at(path)
        remove(guest, path)


def test_a_disk_too_small_for_xfs_is_left_alone(
    guest: FakeGuest, blank: str, tmp_path: Path
) -> None:
    """In mkfs's words, without its usage."""
    if shutil.which("mkfs.xfs") is None or not syscalls.knows_filesystem("xfs"):
        pytest.skip("no xfs here: neither mkfs.xfs nor the kernel's may be missing")
    with pytest.raises(RequestError, match=r"mkfs\.xfs failed \(1\): .* 300MB\.$"):
        add(guest, tmp_path / "m0", 2, EnsureFilesystem=True, Filesystem="xfs")
    assert superblocks.detect(blank) == ""


@pytest.mark.parametrize("word", ["acl", "lazytime", "iversion", "dirsync", "mand", "loud"])
def test_words_that_few_use(guest: FakeGuest, ext4: str, tmp_path: Path, word: str) -> None:
    """The kernel takes them all for an ext4; it shows those that it keeps."""
    add(guest, tmp_path / "m0", Options=[word])
    if word in ("lazytime", "dirsync", "mand"):
        assert word in options_at(tmp_path / "m0")


def test_an_ext2_serves_as_ext4(guest: FakeGuest, tmp_path: Path) -> None:
    """The ext4 driver mounts it as it is, so there is no reason to lose what it holds."""
    path = tmp_path / "m0"
    with loop_disk(guest, 1, image_of(tmp_path / "ext2.img", 16, "mkfs.ext2", "-F", "-q")):
        add(guest, path, EnsureFilesystem=True, Filesystem="ext4")
        assert [kind for kind, _ in mounted_at(path)] == ["ext4"]
        remove(guest, path)
    assert superblocks.detect(str(tmp_path / "ext2.img")) == "ext2"


def test_an_ext4_with_an_older_mark_beside_it_is_not_made_again(
    guest: FakeGuest, tmp_path: Path
) -> None:
    """An ext4 made over a LUKS2 may keep the second header of that among its inodes."""
    image = image_of(tmp_path / "ext4.img", 16, *EXT4, "-O", "^resize_inode")
    with image.open("r+b") as file:
        file.seek(0x4000)
        file.write(b"SKUL\xba\xbe")
    assert superblocks.detect(str(image)) == "crypto_LUKS"
    with image.open("rb") as file:
        file.seek(0x400)
        superblock = file.read(0x400)
    identity = slice(0x68, 0x78)  # s_uuid: another mkfs makes another
    with loop_disk(guest, 1, image):
        add(guest, tmp_path / "m0", EnsureFilesystem=True, Filesystem="ext4")
        remove(guest, tmp_path / "m0")
    with image.open("rb") as file:
        file.seek(0x400)
        assert file.read(0x400)[identity] == superblock[identity]


def test_another_filesystem_is_replaced(guest: FakeGuest, tmp_path: Path) -> None:
    """That is what was asked for; keeping what is there is another request."""
    image = image_of(tmp_path / "swap.img", 16, "mkswap", "-q")
    with loop_disk(guest, 1, image):
        add(guest, tmp_path / "m0", EnsureFilesystem=True, Filesystem="ext4")
        remove(guest, tmp_path / "m0")
    assert superblocks.detect(str(image)) == "ext4"


def test_a_read_only_disk_is_never_formatted(guest: FakeGuest, blank: str, tmp_path: Path) -> None:
    """Whether the request says so or the kernel."""
    ensured = {"EnsureFilesystem": True, "Filesystem": "ext4"}
    with pytest.raises(RequestError, match="read-only and holds no known filesystem"):
        add(guest, tmp_path / "m0", 2, ReadOnly=True, **ensured)
    for ro in guest.sysfs(2).glob("block/*/ro"):
        ro.write_text("1\n")
    with pytest.raises(RequestError, match="read-only and holds no known filesystem"):
        add(guest, tmp_path / "m0", 2, **ensured)
    assert superblocks.detect(blank) == ""
    assert not (tmp_path / "m0").exists()


def test_a_mounted_disk_is_never_formatted(guest: FakeGuest, ext4: str, tmp_path: Path) -> None:
    """Not even when asked for another type."""
    if shutil.which("mkfs.xfs") is None:
        pytest.skip("mkfs.xfs is not installed")
    add(guest, tmp_path / "m0")
    with pytest.raises(RequestError, match="not formatted"):
        add(guest, tmp_path / "m1", EnsureFilesystem=True, Filesystem="xfs")
    assert superblocks.detect(ext4) == "ext4"


def test_mkfs_that_fails_or_is_missing_is_quoted(
    guest: FakeGuest, blank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program in its place says the words."""
    fake = tmp_path / "bin/mkfs.ext4"
    fake.parent.mkdir()
    ensured = {"EnsureFilesystem": True, "Filesystem": "ext4"}
    monkeypatch.setenv("PATH", str(fake.parent))
    with pytest.raises(RequestError, match=r"this guest has no mkfs\.ext4"):
        add(guest, tmp_path / "m0", 2, **ensured)
    fake.write_text("#!/bin/sh\necho too small\necho for this; exit 3\n")
    fake.chmod(0o755)
    with pytest.raises(RequestError, match=r"mkfs\.ext4 failed \(3\): too small; for this"):
        add(guest, tmp_path / "m0", 2, **ensured)
    assert superblocks.detect(blank) == ""


@pytest.mark.parametrize("name", ["nosuchfs", "tmpfs", "proc"])
def test_a_filesystem_that_cannot_be_had_is_named(
    guest: FakeGuest, ext4: str, tmp_path: Path, name: str
) -> None:
    """One that the kernel lacks, and those that are not on disks."""
    with pytest.raises(RequestError, match=f"cannot be mounted as {name}"):
        add(guest, tmp_path / "m0", Filesystem=name)
    assert not (tmp_path / "m0").exists()


def test_a_blank_disk_cannot_be_mounted(guest: FakeGuest, blank: str, tmp_path: Path) -> None:
    """The words say what is missing."""
    with pytest.raises(RequestError, match=r"disk 0:2 \(loop\d+\) holds no filesystem"):
        add(guest, tmp_path / "m0", 2)


def test_a_path_is_for_one_request_at_a_time(guest: FakeGuest, ext4: str, tmp_path: Path) -> None:
    """Two disks at one path, at the same time: the second is refused, not stacked."""
    waiting = threading.Event()
    refused: list[RequestError] = []

    def other() -> None:
        waiting.wait()
        try:
            add(guest, tmp_path / "m0")
        except RequestError as error:
            refused.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    with guest.mounts.claim(str(tmp_path / "m0")):
        waiting.set()
        thread.join()
    assert "another request" in str(refused[0])
