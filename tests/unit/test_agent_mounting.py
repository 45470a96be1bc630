"""What the kernel is asked for when a device is mounted, and what it says; loop devices."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import struct
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest
from support.mounted import loop_device, mounted_at, mounts, options_at, unmount_all

from hotlun.agent import mounting, options, syscalls
from hotlun.agent.errors import RequestError
from hotlun.agent.kernel import Kernel
from hotlun.agent.mounts import Mounts
from hotlun.agent.uevents import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hotlun.agent.block_devices import BlockDevice

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="loop devices and mount(2) need root"),
]

XFS_IOC_GOINGDOWN = 0x8004587D
DIGEST = b"as asked"
MAKERS = {
    "ext4": (16, ("mkfs.ext4", "-F", "-q")),
    "xfs": (320, ("mkfs.xfs", "-f", "-q")),
    "btrfs": (128, ("mkfs.btrfs", "-f", "-q")),
}


class Disk:
    """A device and the agent's mounts, for one filesystem."""

    def __init__(self, device: BlockDevice, filesystem: str) -> None:
        self.mounts = Mounts(Kernel())
        self.device = device
        self.filesystem = filesystem

    def mount(
        self,
        path: Path,
        *words: str,
        read_only: bool = False,
        digest: bytes = DIGEST,
        before: Callable[[], object] = lambda: None,
    ) -> bool:
        """Mount it if need be, as `Disks` does; whether it was mounted already."""
        with self.mounts.claim(str(path)) as place:
            if self.mounts.mounted_as(
                self.device, place, words, read_only=read_only, digest=digest
            ):
                return True
            self.mounts.check_free(place)
            before()
            self.mounts.mount(
                self.device, place, self.filesystem, words, read_only=read_only, digest=digest
            )
            return False

    def unmount(
        self,
        path: Path,
        *more: BlockDevice,
        lazy: bool = False,
        seconds: float = 0,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        with self.mounts.claim(str(path)) as place:
            place.stack()
            before()
            self.mounts.unmount([self.device, *more], place, lazy=lazy, deadline=Deadline(seconds))


@contextlib.contextmanager
def disk_of(filesystem: str, directory: Path) -> Iterator[Disk]:
    """A disk with a filesystem on it; its image and its mounts are in the directory."""
    size, command = MAKERS[filesystem]
    if not syscalls.knows_filesystem(filesystem) or not shutil.which(command[0]):
        pytest.skip(f"no {filesystem} here: neither its mkfs nor the kernel's may be missing")
    image = directory / f"{filesystem}.img"
    with image.open("wb") as file:
        file.truncate(size << 20)
    subprocess.run([*command, str(image)], check=True, capture_output=True)
    with loop_device(image) as device:
        yield Disk(device, filesystem)
        unmount_all(directory)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with disk_of("ext4", tmp_path) as disk:
        yield disk


@pytest.fixture(params=["fsopen", "mount"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By fsopen(2), and as on a kernel before 5.2."""
    if request.param == "mount":

        def fsopen(filesystem: str) -> int:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), filesystem)

        monkeypatch.setattr(syscalls, "fsopen", fsopen)
        monkeypatch.setattr(syscalls, "open_straight", lambda folder: None)
        monkeypatch.setattr(syscalls, "look", lambda folder, name: None)
        monkeypatch.setattr(syscalls, "identity", lambda folder, path="": None)
    return str(request.param)


@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs"])
def test_each_filesystem_is_known_again(tmp_path: Path, filesystem: str, way: str) -> None:
    """By another agent too; and nothing of it is left in the end."""
    path = tmp_path / "run/scsi/m0"
    with disk_of(filesystem, tmp_path) as disk:
        assert not disk.mount(path, "noatime")
        (path / "file").write_text("here")
        disk.mounts = Mounts(Kernel())
        assert disk.mount(path, "noatime")
        assert [kind for kind, _ in mounted_at(path)] == [filesystem]
        assert (path / "file").read_text() == "here"
        disk.unmount(path)
        assert mounted_at(path) == []
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "Invalid argument: ext4: Unknown parameter 'nonsense'"),
        (["commit=5", "nonsense=1"], "ext4: Unknown parameter 'nonsense'"),
        (["commit=5,nonsense"], "ext4: Bad value for 'commit'"),
        (['commit="5"'], "ext4: Bad value for 'commit'"),
        (["journal_path=/nowhere/at/all"], "cannot be mounted"),
        (["source=/dev/null"], "Multiple sources"),
        (["=5"], "cannot be mounted"),
    ],
)
def test_what_the_kernel_refuses_it_says(
    disk: Disk, tmp_path: Path, words: list[str], said: str
) -> None:
    """Its own words are in the error; each option went to it as one."""
    with pytest.raises(RequestError) as caught:
        disk.mount(tmp_path / "run/m0", *words)
    assert said in str(caught.value)
    assert f"disk 0:1 ({disk.device.name}) cannot be mounted at {tmp_path}/run/m0 as ext4: " in str(
        caught.value
    )
    assert not (tmp_path / "run").exists()


def test_a_device_without_the_filesystem(disk: Disk, tmp_path: Path) -> None:
    """The kernel says no more than that it is invalid; what that may mean is added."""
    disk.filesystem = "squashfs"
    with pytest.raises(RequestError, match=r"as squashfs: Invalid argument"):
        disk.mount(tmp_path / "m0")
    disk.filesystem = "nonsense"
    with pytest.raises(RequestError, match=r"No such device \(this guest's kernel has no such"):
        disk.mount(tmp_path / "m0")


def test_options_come_in_their_order(disk: Disk, tmp_path: Path, way: str) -> None:
    """The filesystem's later words undo its earlier ones, as do ours."""
    words = ("commit=5", "noatime", "commit=77", "ro", "relatime", "rw", "nosuid", "suid")
    disk.mount(tmp_path / "m0", *words, "nodev", "shared", "slave", "shared")
    seen = options_at(tmp_path / "m0")
    assert {"commit=77", "relatime", "rw", "nodev"} <= seen
    assert not {"noatime", "ro", "nosuid", "commit=5"} & seen
    assert any(word.startswith("shared:") for word in seen)


@pytest.mark.parametrize(
    "words",
    [
        ("noatime", "nodiratime", "nosuid", "nodev", "noexec"),
        ("nosymfollow",),
        ("sync", "dirsync"),
        ("lazytime",),
        ("ro",),
        ("mand",),
    ],
)
def test_flags_reach_the_kernel(
    disk: Disk, tmp_path: Path, words: tuple[str, ...], way: str
) -> None:
    """Those of the mount and those of the filesystem, in both ways."""
    disk.mount(tmp_path / "m0", *words)
    assert set(words) <= options_at(tmp_path / "m0")


def test_strict_times_are_kept(disk: Disk, tmp_path: Path, way: str) -> None:
    """Which shows by no word about them."""
    disk.mount(tmp_path / "m0", "noatime", "strictatime")
    assert not {"noatime", "relatime"} & options_at(tmp_path / "m0")


@pytest.mark.parametrize("words", [("acl",), ("silent",), ("iversion",)])
def test_words_that_only_mount_knows(disk: Disk, tmp_path: Path, words: tuple[str, ...]) -> None:
    """The kernel takes them for an ext4, beside others."""
    disk.mount(tmp_path / "m0", *words, "commit=77", "noatime", "shared")
    assert {"commit=77", "noatime"} <= options_at(tmp_path / "m0")


def test_a_disk_that_is_read_only_stays_so(disk: Disk, tmp_path: Path, way: str) -> None:
    """Whatever the words say, and however they say it."""
    disk.mount(tmp_path / "m0", "rw", "rw=1", read_only=True)
    assert {"ro", "norecovery"} <= options_at(tmp_path / "m0")
    assert "rw" not in options_at(tmp_path / "m0")


def test_read_only_beside_writable(disk: Disk, tmp_path: Path, way: str) -> None:
    """It is so for the mount that asked for it alone."""
    disk.mount(tmp_path / "m0")
    disk.mount(tmp_path / "m1", "ro", "nosuid")
    assert {"ro", "nosuid"} <= options_at(tmp_path / "m1")
    assert not {"ro", "nosuid"} & options_at(tmp_path / "m0")
    (tmp_path / "m0/file").write_text("seen by both")
    assert (tmp_path / "m1/file").read_text() == "seen by both"


def test_writable_beside_read_only_is_refused(disk: Disk, tmp_path: Path, way: str) -> None:
    """As is a disk that is read-only beside itself writable: all or nothing."""
    disk.mount(tmp_path / "m0", "ro")
    with pytest.raises(RequestError, match="resource busy"):
        disk.mount(tmp_path / "m1")
    disk.unmount(tmp_path / "m0")
    disk.mount(tmp_path / "m0")
    with pytest.raises(RequestError, match="resource busy"):
        disk.mount(tmp_path / "m1", read_only=True)
    assert not (tmp_path / "m1").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), {"shared"}),
        (("private",), set()),
        (("slave",), {"master"}),
        (("unbindable",), {"unbindable"}),
        (("private", "shared"), {"shared"}),
        (("rslave", "rshared"), {"master", "shared"}),
    ],
)
def test_propagation_below_a_shared_folder(
    disk: Disk, tmp_path: Path, words: tuple[str, ...], expected: set[str], way: str
) -> None:
    """What is put there becomes shared, until the words have their say, in order.

    To be a slave takes a master: the mount's twin in a copy of the folder.
    """
    folder, copy = tmp_path / "folder", tmp_path / "copy"
    folder.mkdir()
    copy.mkdir()
    syscalls.mount(str(folder), str(folder), "", options.MS_BIND)
    syscalls.mount("", str(folder), "", options.MS_SHARED)
    syscalls.mount(str(folder), str(copy), "", options.MS_BIND)
    disk.mount(folder / "m0", *words)
    kinds = {word.partition(":")[0] for word in options_at(folder / "m0")}
    assert kinds & {"shared", "master", "unbindable"} == expected
    disk.unmount(folder / "m0")


def test_what_was_not_finished_is(disk: Disk, tmp_path: Path, way: str) -> None:
    """An agent was killed when the mount was there: the next one sets the rest."""
    path = tmp_path / "m0"
    with disk.mounts.claim(str(path)) as place:
        directory = place.make_directory()
        place.set_label(directory, DIGEST)
        asked = options.parse(["nodev"])
        os.close(mounting.mount(disk.device.node, "ext4", asked, directory, read_only=False))
        os.close(directory)
    assert disk.mount(path, "nosuid", "noatime", "shared")
    assert {"nosuid", "noatime"} <= options_at(path)
    assert any(word.startswith("shared:") for word in options_at(path))


def test_what_was_not_begun_is_begun(disk: Disk, tmp_path: Path) -> None:
    """An agent was killed with the directory made and labelled, nothing else."""
    path = tmp_path / "run/m0"
    for undo in (False, True):
        with disk.mounts.claim(str(path)) as place:
            directory = place.make_directory()
            place.set_label(directory, b"something else")
            os.close(directory)
        if not undo:
            assert not disk.mount(path)
            assert disk.mount(path)
        disk.unmount(path)
        assert not (tmp_path / "run").exists()


def test_another_disk_or_another_wish_is_refused(disk: Disk, tmp_path: Path) -> None:
    """What is there is named, and stays."""
    path = tmp_path / "m0"
    disk.mount(path)
    with pytest.raises(RequestError, match=f"{disk.device.node} is mounted there, not as asked"):
        disk.mount(path, digest=b"other")
    with disk_of("btrfs", tmp_path) as other:
        with pytest.raises(RequestError, match=f"{path} is in use: {disk.device.node} is mounted"):
            other.mount(path)
        assert mounted_at(path) == [("ext4", disk.device.node)]


def test_a_mount_of_somebody_else_is_not_taken_for_ours(disk: Disk, tmp_path: Path) -> None:
    """The right disk at the right path, but nothing says how."""
    (tmp_path / "m0").mkdir()
    syscalls.mount(disk.device.node, str(tmp_path / "m0"), "ext4", 0)
    with pytest.raises(RequestError, match="or not by an agent"):
        disk.mount(tmp_path / "m0")


def test_where_nothing_can_be_noted_a_repeat_is_refused(disk: Disk, tmp_path: Path) -> None:
    """A ramfs keeps no labels; all else is as anywhere."""
    (tmp_path / "here").mkdir()
    syscalls.mount("none", str(tmp_path / "here"), "ramfs", 0)
    path = tmp_path / "here/run/m0"
    disk.mount(path)
    with pytest.raises(RequestError, match="is in use"):
        disk.mount(path)
    disk.unmount(path)
    assert not path.parent.exists()


def test_a_users_directory_is_as_it_was(disk: Disk, tmp_path: Path) -> None:
    """Also after a mount that failed."""
    path = tmp_path / "mine"
    path.mkdir()
    disk.mount(path)
    disk.unmount(path)
    assert os.listxattr(path) == []
    with pytest.raises(RequestError):
        disk.mount(path, "nonsense")
    assert os.listxattr(path) == []
    assert path.is_dir()


def test_a_late_step_that_fails_undoes_the_mount(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Before its directory is touched, so that what is on the disk stays."""
    path = tmp_path / "run/m0"
    disk.mount(path)
    (path / "precious").write_text("still here")
    disk.unmount(path)
    real = syscalls.mount

    def mount(source: str, target: str, filesystem: str, flags: int, data: str = "") -> None:
        if flags & options.MS_SHARED:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), target)
        real(source, target, filesystem, flags, data)

    with monkeypatch.context() as patch, pytest.raises(RequestError, match="not permitted"):
        patch.setattr(syscalls, "mount", mount)
        disk.mount(path, "shared")
    assert not (tmp_path / "run").exists()
    disk.mount(path)
    assert (path / "precious").read_text() == "still here"


class Home:
    """A folder whose owner makes it a link to where root should work for him."""

    def __init__(self, root: Path) -> None:
        self.folder, self.away, self.victim = root / "folder", root / "away", root / "victim"
        self.folder.mkdir()
        (self.victim / "m0").mkdir(parents=True)

    def swap(self) -> None:
        self.folder.rename(self.away)
        self.folder.symlink_to(self.victim)


def test_a_mount_does_not_follow_a_folder_that_became_a_link(
    disk: Disk, tmp_path: Path, way: str
) -> None:
    """It is undone, as it is not where it was asked for, and never was where the link leads."""
    home = Home(tmp_path)
    with pytest.raises(RequestError, match="was moved away or mounted on meanwhile"):
        disk.mount(home.folder / "m0", before=home.swap)
    assert mounted_at(home.victim / "m0") == mounted_at(home.away / "m0") == []
    assert list(home.away.iterdir()) == []
    assert list(home.victim.iterdir()) == [home.victim / "m0"]


@pytest.mark.parametrize("has_it_too", [False, True])
@pytest.mark.parametrize("above", ["y", "y/z"])
def test_a_mount_is_not_made_below_another_that_came_meanwhile(
    disk: Disk, tmp_path: Path, above: str, has_it_too: bool, way: str
) -> None:
    """It waited for its disk: it would be out of sight, where nobody can unmount it."""
    folder, path = tmp_path / above, tmp_path / "y/z/w"
    (tmp_path / "y/z").mkdir(parents=True)
    if has_it_too:
        disk.mount(folder)
        path.mkdir(parents=True)
        disk.unmount(folder)
    expected = f"above {path} was moved away or mounted on meanwhile"
    if way == "mount" and above == "y/z":
        expected = f"cannot be mounted at {path} as ext4: No such file"
    with pytest.raises(RequestError, match=expected):
        disk.mount(path, before=lambda: disk.mount(folder))
    disk.unmount(folder)
    assert list((tmp_path / "y/z").iterdir()) == []
    assert not any(mount.source == disk.device.node for mount in mounts())


def test_a_link_is_not_made_below_a_mount_that_came_meanwhile(disk: Disk, tmp_path: Path) -> None:
    """Nor is one left there."""
    folder = tmp_path / "y"
    folder.mkdir()
    with disk.mounts.claim(str(folder / "disk")) as place:
        disk.mounts.check_free(place, link=True)
        disk.mount(folder)
        with pytest.raises(RequestError, match="was moved away or mounted on meanwhile"):
            disk.mounts.link(disk.device, place)
    disk.unmount(folder)
    assert list(folder.iterdir()) == []


def test_an_unmount_does_not_follow_a_folder_that_became_a_link(disk: Disk, tmp_path: Path) -> None:
    """What is unmounted is what was looked at."""
    home = Home(tmp_path)
    disk.mount(home.victim / "m0")
    disk.mount(home.folder / "m0")
    disk.unmount(home.folder / "m0", before=home.swap)
    assert mounted_at(home.victim / "m0") == [("ext4", disk.device.node)]
    assert mounted_at(home.away / "m0") == []
    assert list(home.away.iterdir()) == []


def test_a_link_is_not_made_where_a_link_leads(disk: Disk, tmp_path: Path) -> None:
    """Nor is one removed there."""
    home = Home(tmp_path)
    with disk.mounts.claim(str(home.folder / "disk")) as place:
        disk.mounts.check_free(place, link=True)
        home.swap()
        with pytest.raises(RequestError, match="was moved away or mounted on meanwhile"):
            disk.mounts.link(disk.device, place)
        (home.victim / "disk").symlink_to(disk.device.node)
        disk.mounts.unlink([disk.device], place)
    assert os.readlink(home.victim / "disk") == disk.device.node
    assert list(home.away.iterdir()) == []


def test_an_owner_who_never_stops_gets_no_mount(disk: Disk, tmp_path: Path) -> None:
    """Folder, link, folder, link, while it is mounted and unmounted again and again."""
    home = Home(tmp_path)
    stop = threading.Event()

    def attack() -> None:
        folder, away = home.folder, home.away
        steps = (
            lambda: folder.rename(away),
            lambda: folder.symlink_to(home.victim),
            folder.unlink,
            lambda: away.rename(folder),
        )
        while not stop.is_set():
            for step in steps:
                with contextlib.suppress(OSError):  # the agent made a folder where none was
                    step()

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        for _ in range(100):
            with (
                contextlib.suppress(RequestError),
                disk.mounts.claim(str(home.folder / "m0")) as place,
            ):
                if place.path != str(home.folder / "m0"):
                    continue  # it was a link before it was claimed: that is where it leads
                with contextlib.suppress(RequestError):
                    disk.mounts.mount(
                        disk.device, place, "ext4", (), read_only=False, digest=DIGEST
                    )
                assert mounted_at(home.victim / "m0") == []
                disk.mounts.unmount([disk.device], place, deadline=Deadline(0))
            assert list(home.victim.iterdir()) == [home.victim / "m0"]
            assert list((home.victim / "m0").iterdir()) == []
    finally:
        stop.set()
        attacker.join()


def test_what_becomes_free_in_time_is_unmounted(disk: Disk, tmp_path: Path) -> None:
    """A file that is open now and closed soon."""
    disk.mount(tmp_path / "m0")
    file = (tmp_path / "m0/file").open("w")
    timer = threading.Timer(0.2, file.close)
    timer.start()
    disk.unmount(tmp_path / "m0", seconds=20)
    timer.join()
    assert not (tmp_path / "m0").exists()


def test_what_stays_busy_is_named(disk: Disk, tmp_path: Path) -> None:
    """At the deadline, not before."""
    disk.mount(tmp_path / "m0")
    began = time.monotonic()
    with (
        (tmp_path / "m0/file").open("w"),
        pytest.raises(RequestError, match=f"cannot be unmounted from {tmp_path}/m0: .* busy: .*"),
    ):
        disk.unmount(tmp_path / "m0", seconds=0.3)
    assert time.monotonic() - began >= 0.3
    assert mounted_at(tmp_path / "m0") == [("ext4", disk.device.node)]


def test_a_lazy_unmount_does_not_wait(disk: Disk, tmp_path: Path) -> None:
    """Out of sight at once, its directory too; the file can still be written."""
    disk.mount(tmp_path / "run/m0")
    with (tmp_path / "run/m0/file").open("w") as file:
        disk.unmount(tmp_path / "run/m0", lazy=True, seconds=20)
        assert not (tmp_path / "run").exists()
        file.write("more")
    disk.mount(tmp_path / "run/m0")
    assert (tmp_path / "run/m0/file").read_text() == "more"


def test_a_lazy_unmount_takes_nothing_else_along(disk: Disk, tmp_path: Path) -> None:
    """What is mounted on it would be out of sight, too, and nobody could unmount it."""
    path = tmp_path / "m0"
    disk.mount(path)
    (path / "below").mkdir()
    syscalls.mount("below", str(path / "below"), "tmpfs", 0)
    with pytest.raises(RequestError, match=f"{path}/below is mounted on it"):
        disk.unmount(path, lazy=True)
    assert mounted_at(path / "below") == [("tmpfs", "below")]


def test_a_disk_and_what_is_mapped_to_it_go_together(disk: Disk, tmp_path: Path) -> None:
    """One of them on the other, at one path: both are of what is to be unmounted."""
    path = tmp_path / "m0"
    disk.mount(path)
    with disk_of("btrfs", tmp_path) as mapped:
        syscalls.mount(mapped.device.node, str(path), "btrfs", 0)
        disk.unmount(path, mapped.device)
        assert mounted_at(path) == []
        assert not path.exists()


def test_a_filesystem_that_is_shut_down_is_unmounted(tmp_path: Path) -> None:
    """As an xfs is whose disk is gone: its root says nothing about itself any more."""
    with disk_of("xfs", tmp_path) as disk:
        disk.mount(tmp_path / "run/m0")
        root = os.open(tmp_path / "run/m0", os.O_RDONLY)
        fcntl.ioctl(root, XFS_IOC_GOINGDOWN, struct.pack("I", 2))
        os.close(root)
        with pytest.raises(OSError, match="Input/output"):
            (tmp_path / "run/m0").stat()
        assert disk.mount(tmp_path / "run/m0")
        disk.unmount(tmp_path / "run/m0")
        assert not (tmp_path / "run").exists()


def test_what_an_unmount_left_the_next_one_removes(disk: Disk, tmp_path: Path) -> None:
    """An agent was killed between unmounting and removing the directory."""
    disk.mount(tmp_path / "run/m0")
    syscalls.unmount(str(tmp_path / "run/m0"))
    disk.unmount(tmp_path / "run/m0")
    assert not (tmp_path / "run").exists()


def test_a_link_to_the_device_is_success(disk: Disk, tmp_path: Path) -> None:
    """It is there already; one to elsewhere is told of and stays."""
    path = tmp_path / "dev/disk"
    for _ in range(2):
        with disk.mounts.claim(str(path)) as place:
            disk.mounts.check_free(place, link=True)
            disk.mounts.link(disk.device, place)
        assert os.readlink(path) == disk.device.node
    with disk.mounts.claim(str(path)) as place:
        mapped = disk.device._replace(name="dm-0", node="/dev/dm-0")
        with pytest.raises(RequestError, match=f"a link to {disk.device.node}"):
            disk.mounts.link(mapped, place)
        disk.mounts.unlink([mapped], place)
        assert path.is_symlink()
        disk.mounts.unlink([mapped, disk.device], place)
    assert not path.parent.exists()


@pytest.mark.parametrize("kind", ["file", "directory", "mount"])
def test_a_link_needs_a_free_path(disk: Disk, tmp_path: Path, kind: str) -> None:
    """Whatever is there is told of, and stays."""
    path = tmp_path / "m0"
    if kind == "file":
        path.write_text("mine")
    elif kind == "directory":
        path.mkdir()
    else:
        disk.mount(path)
    with (
        disk.mounts.claim(str(path)) as place,
        pytest.raises(RequestError, match=r"exists already|is in use"),
    ):
        disk.mounts.check_free(place, link=True)


def test_no_descriptor_is_left(disk: Disk, tmp_path: Path, way: str) -> None:
    """Of a mount that came and went, was repeated, refused, and failed."""
    disk.mount(tmp_path / "m0")  # loads what is loaded once
    before = os.listdir("/proc/self/fd")
    disk.mount(tmp_path / "m1", "shared")
    disk.mount(tmp_path / "m1", "shared")
    for words in (("nonsense",), ("nosuid",)):
        with contextlib.suppress(RequestError):
            disk.mount(tmp_path / "m1", *words, digest=b"other")
        with contextlib.suppress(RequestError):
            disk.mount(tmp_path / "m2", *words)
    disk.unmount(tmp_path / "m1")
    disk.unmount(tmp_path / "m2")
    assert len(os.listdir("/proc/self/fd")) == len(before)
