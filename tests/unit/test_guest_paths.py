"""Rules 3 and 4: guest paths never collide, and generated ones are the lowest that fit."""

from __future__ import annotations

import asyncio

import pytest
from support.memory import VM, XFS, A, B, C

from hotlun import GuestPathConflictError, Manager, MountConfig
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend
from hotlun.guest_paths import GuestPaths, normalise


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("/a", "/a"),
        ("/a/", "/a"),
        ("//a//b", "/a/b"),
        ("/./a/./b/.", "/a/b"),
        ("/a b", "/a b"),
        ("/...", "/..."),
    ],
)
def test_linux_spellings(written: str, normal: str) -> None:
    """One spelling for `//`, `.` and a trailing slash."""
    assert normalise(written, "linux") == normal


@pytest.mark.parametrize("path", ["a", "./a", "/a/../b", "/..", "/", "//", "/a\0b", "/\udc80"])
def test_linux_paths_that_can_never_be_right(path: str) -> None:
    """Relative, `..`, NUL, the root itself, and what no text can carry."""
    with pytest.raises(ValueError, match="guest"):
        normalise(path, "linux")


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        (r"c:\a", r"c:\a"),
        ("c:/a/b", r"c:\a\b"),
        ("D:\\a\\\\b\\", r"D:\a\b"),
        (r"c:\.\a\.\b", r"c:\a\b"),
        (r"c:\a.\b. .", r"c:\a\b"),
        (r"c:\a b\.c", r"c:\a b\.c"),
        (r"c:\console\com", r"c:\console\com"),
    ],
)
def test_windows_spellings(written: str, normal: str) -> None:
    """Both separators, a drive, no trailing one, and no dots and spaces at the end."""
    assert normalise(written, "windows") == normal


@pytest.mark.parametrize(
    "path",
    [
        "/a",
        r"c:a",
        r"\a",
        r"c:\a\..\b",
        "c:\\",
        "c:/.",
        r"\\?\c:\a",
        r"\\server\share\a",
        r"c:\a\.. ",
        r"c:\...\a",
        "c:\\a\\ ",
        "c:\\a \\b",
        r"c:\a..\b",
        *(f"c:\\a{letter}b\\c" for letter in '<>:"|?*\n'),
        r"c:\a\nul",
        r"c:\Con.txt\a",
        r"c:\com1 .x",
    ],
)
def test_windows_paths_that_can_never_be_right(path: str) -> None:
    """No drive, drive-relative, `..`, the drive's root, and what no folder can be called."""
    with pytest.raises(ValueError, match="guest"):
        normalise(path, "windows")


@pytest.mark.parametrize("path", ["/m/x", "/m/x/", "/m//x", "/m", "/m/x/y", "/m/x/y/z"])
async def test_equal_above_or_below_conflicts(vm: VM, path: str) -> None:
    """Before any I/O, whatever the spelling."""
    await vm.add(A, guest_path="/m/x")
    vm.said()
    with pytest.raises(GuestPathConflictError):
        await vm.add(B, guest_path=path)
    assert vm.said() == []
    assert vm.status(0, 1).state == "free"


async def test_neighbours_do_not_conflict(vm: VM) -> None:
    """A common beginning of the name is no folder."""
    await vm.add(A, guest_path="/m/x")
    assert (await vm.add(B, guest_path="/m/xy")).guest_path == "/m/xy"
    assert (await vm.add(C, guest_path="/m/w")).guest_path == "/m/w"


async def test_windows_paths_conflict_without_case() -> None:
    """c:\\A is c:\\a there."""
    guest = MemoryGuestBackend(os_type="windows")
    async with Manager(MemoryHostBackend(), guest) as manager:
        await manager.add_virtual_disk(A, mount=MountConfig(), guest_path=r"c:\A")
        with pytest.raises(GuestPathConflictError):
            await manager.add_virtual_disk(B, mount=MountConfig(), guest_path=r"C:/a/b")


def test_windows_paths_are_compared_as_its_file_system_does() -> None:
    """Letter by letter: what only looks alike is another's."""
    paths = GuestPaths(None, "windows")
    paths.take(paths.normalise(r"c:\STRASSE"))
    paths.check_free(paths.normalise("c:\\stra\u00dfe"))
    with pytest.raises(GuestPathConflictError, match=r"below another guest mount's, C:.strasse"):
        paths.check_free(paths.normalise("C:/strasse/a"))


async def test_a_path_is_taken_when_the_add_is_decided(vm: VM) -> None:
    """Of two racing adds the second fails, though nothing is mounted yet."""
    one, two = await asyncio.gather(
        vm.add(A, guest_path="/m"), vm.add(B, guest_path="/m"), return_exceptions=True
    )
    assert not isinstance(one, BaseException)
    assert isinstance(two, GuestPathConflictError)
    assert "attach" in vm.said()


async def test_another_config_of_the_same_disk_may_not_have_the_path(vm: VM) -> None:
    """Two guest mounts never share a path."""
    await vm.add(guest_path="/m")
    with pytest.raises(GuestPathConflictError):
        await vm.add(mount=XFS, guest_path="/m")


async def test_a_released_path_is_free_again(vm: VM) -> None:
    """And so are the folders above it."""
    await (await vm.add(A, guest_path="/m/x")).release()
    assert (await vm.add(B, guest_path="/m")).guest_path == "/m"


async def test_a_path_of_a_failed_mount_is_free_again(vm: VM) -> None:
    """Nothing of a failed add stays."""
    vm.guest.fail("mount", OSError("no"))
    with pytest.raises(OSError, match="no"):
        await vm.add(A, guest_path="/m")
    await vm.add(B, guest_path="/m")


async def test_generated_paths_take_the_lowest_number(vm: VM) -> None:
    """Released numbers come again, lowest first."""
    mounts = [await vm.add(f"/disks/{n}.img") for n in range(4)]
    assert [m.guest_path for m in mounts] == [f"/run/mounts/scsi/m{n}" for n in range(4)]
    await mounts[2].release()
    await mounts[1].release()
    assert (await vm.add(A)).guest_path == "/run/mounts/scsi/m1"
    assert (await vm.add(B)).guest_path == "/run/mounts/scsi/m2"


async def test_generated_paths_avoid_stated_ones(vm: VM) -> None:
    """Also such that lie below; and the number counts again once they are gone."""
    below = await vm.add("/disks/0.img", guest_path="/run/mounts/scsi/m0/data")
    same = await vm.add("/disks/1.img", guest_path="/run/mounts/scsi/m1")
    assert (await vm.add(A)).guest_path == "/run/mounts/scsi/m2"
    await below.release()
    assert (await vm.add(B)).guest_path == "/run/mounts/scsi/m0"
    await same.release()
    assert (await vm.add(C)).guest_path == "/run/mounts/scsi/m1"


async def test_a_path_that_blocks_every_generated_one(vm: VM) -> None:
    """If none can ever fit that is an error, not a search for ever."""
    await vm.add(A, guest_path="/run/mounts")
    vm.said()
    with pytest.raises(GuestPathConflictError, match="/run/mounts"):
        await vm.add(B)
    assert vm.said() == []


async def test_what_blocked_every_generated_path_blocks_none_once_it_is_gone() -> None:
    """The lowest number is free as ever."""
    async with VM() as vm:
        mount = await vm.add(A, guest_path="/run/mounts")
        for _ in range(3):
            with pytest.raises(GuestPathConflictError):
                await vm.add(B)
        await mount.release()
        assert (await vm.add(B)).guest_path == "/run/mounts/scsi/m0"


class Counted(GuestPaths):
    """Guest paths that count how often one of them is looked up."""

    looks = 0

    def _key(self, path: str) -> str:
        self.looks += 1
        return super()._key(path)


@pytest.mark.parametrize("stated", ["/run/mounts/scsi/m%d", "/run/mounts/scsi/m%d/data"])
def test_paths_in_the_way_are_found_out_once(stated: str) -> None:
    """As after a restart, when all paths of before count as stated: 256 of them, or one."""
    looks = []
    for others in (1, 256):
        paths = Counted(None, "linux")
        for number in range(others):
            paths.take(stated % number)
        paths.take(*paths.generate())
        before = paths.looks
        path, number = paths.generate()
        assert number == others + 1
        paths.take(path, number)
        paths.give_back(path)
        looks.append(paths.looks - before)
    assert looks[0] == looks[1]


def test_each_number_comes_again_once_nothing_is_in_its_way() -> None:
    """Whether the path itself was taken, or one below, or a folder above."""
    paths = GuestPaths("/m/%d/data", "linux")
    for path in ("/m/0/data", "/m/1/data/below", "/m/2"):
        paths.take(path)
    paths.take(*paths.generate())
    for freed, number in (("/m/2", 2), ("/m/1/data/below", 1), ("/m/0/data", 0)):
        paths.give_back(freed)
        assert paths.generate() == (f"/m/{number}/data", number)


async def test_the_default_format_is_the_guests() -> None:
    """Windows guests have drives."""
    guest = MemoryGuestBackend(os_type="windows")
    async with Manager(MemoryHostBackend(), guest) as manager:
        mount = await manager.add_virtual_disk(A, mount=MountConfig())
        assert mount.guest_path == r"c:\mounts\scsi\m0"


async def test_a_format_of_the_callers_own() -> None:
    """The number may stand anywhere."""
    async with VM(guest_mount_format="/mnt/%d/data/") as vm:
        assert (await vm.add()).guest_path == "/mnt/0/data"


@pytest.mark.parametrize("pattern", ["/m", "/m%d%d", "/m%s", "/m%%d", "m%d", "/%d/..", "/m%d\0"])
def test_a_wrong_format_is_refused_at_once(pattern: str) -> None:
    """Exactly one %d, and an absolute path."""
    with pytest.raises(ValueError, match=r"guest"):
        GuestPaths(pattern, "linux")


@pytest.mark.parametrize("pattern", [r"c:\com%d", r"c:\LPT%d.d\m"])
def test_a_format_that_makes_names_of_devices_is_refused_at_once(pattern: str) -> None:
    """And not when the first disk is already attached."""
    with pytest.raises(ValueError, match="nothing can be called"):
        GuestPaths(pattern, "windows")
    assert GuestPaths(pattern.replace("%d", "_%d"), "windows").generate()[1] == 0
