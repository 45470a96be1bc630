r"""What a disk of the host's is known by, here and on Windows: rule 1, for paths."""

from __future__ import annotations

import ntpath
import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from hotlun import Attachment, DiskConflictError, ImageFormat, Slot
from hotlun.attachments import AttachmentTable, identify, physical_disk, virtual_disk
from hotlun.host_paths import HERE, Posix, Windows, moved, same
from hotlun.states import DiskState

if TYPE_CHECKING:
    from pathlib import Path


FOLDERS = {".": r"C:\Users\me", "C:": r"C:\Users\me", "D:": r"D:\vm"}
WINDOWS = Windows(current=FOLDERS.__getitem__, resolve=lambda path: path)


def status(mode: int = stat.S_IFREG, number: int = 0, device: int = 0) -> os.stat_result:
    """A stat that says so much, and zeros."""
    return os.stat_result((mode, number, device, 1, 0, 0, 0, 0, 0, 0))


def known_by(path: str, said: os.stat_result | None = None) -> object:
    """What a disk at this path is known by on Windows."""
    return WINDOWS.identity(WINDOWS.locate(path)[1], said)


@pytest.mark.parametrize(
    "path",
    [
        r"c:\VM\a.vhdx",
        "C:/vm/a.vhdx",
        r"\\?\C:\vm\a.vhdx",
        r"\\.\C:\vm\a.vhdx",
        r"C:\vm\.\x\..\\a.vhdx",
        r"C:\vm.\a.vhdx. .",
    ],
)
def test_spellings_of_a_file_that_is_not_there(path: str) -> None:
    """It is known by what they have in common."""
    assert known_by(path) == known_by(r"C:\vm\a.vhdx")


@pytest.mark.parametrize(
    "path", [r"\\.\PHYSICALDRIVE2", r"\\.\PhysicalDrive2", r"\\?\PhysicalDrive2"]
)
def test_a_disk_is_known_by_its_name(path: str) -> None:
    """Its stat says that it is a block device, and nothing else, as every other's does."""
    said = status(stat.S_IFBLK)
    assert known_by(path, said) == known_by(r"\\.\PhysicalDrive2", None)
    assert known_by(path, said) != known_by(r"\\.\PhysicalDrive3", said)


def test_a_file_without_a_number_is_known_by_its_path() -> None:
    """Some network file systems number nothing: two files of theirs are two."""
    one, two = r"\\server\share\a.vhdx", r"\\server\share\b.vhdx"
    assert known_by(one, status()) == known_by(r"\\?\UNC\SERVER\share\A.vhdx", status())
    assert known_by(one, status()) != known_by(two, status())


@pytest.mark.parametrize(
    ("mode", "one", "again", "other"),
    [
        (stat.S_IFBLK, r"\\.\PhysicalDrive1", "//?/PHYSICALDRIVE1", r"\\.\PhysicalDrive2"),
        (stat.S_IFREG, r"\\s\h\a.vhdx", r"\\?\UNC\S\H\A.vhdx", r"\\s\h\b.vhdx"),
    ],
)
def test_what_has_zeros_for_numbers_is_not_one_disk(
    mode: int, one: str, again: str, other: str
) -> None:
    """Two disks of Windows, or two files that are not numbered, are two; a spelling is none."""

    def zeros(path: str) -> os.stat_result:
        return status(mode)

    assert same(one, again, replace(WINDOWS, ask=zeros))
    assert not same(one, other, replace(WINDOWS, ask=zeros))


def test_two_paths_to_one_file() -> None:
    """Lead to one number; where nothing can be asked, they are two."""
    one, other = r"C:\a.vhdx", r"D:\b.vhdx"
    assert same(one, other, replace(WINDOWS, ask=lambda path: status(number=5, device=7)))

    def nothing(path: str) -> os.stat_result:
        raise FileNotFoundError(2, "not there", path)

    assert not same(one, other, replace(WINDOWS, ask=nothing))


def test_a_file_is_known_by_its_number() -> None:
    """Whatever its path is."""
    said = status(number=5, device=7)
    assert known_by(r"C:\a", said) == known_by(r"D:\b", said) == ("file", 7, 5)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("a.vhdx", r"C:\Users\me\a.vhdx"),
        (r"..\A.vhdx", r"C:\Users\A.vhdx"),
        (r"\a.vhdx", r"C:\a.vhdx"),
        ("D:a.vhdx", r"D:\vm\a.vhdx"),
        (r"d:..\a.vhdx", r"D:\a.vhdx"),
        ("C:/vm/A.vhdx", r"C:\vm\A.vhdx"),
        (r"\\?\c:\vm\A. ", r"\\?\c:\vm\A. "),
        (r"\\.\PhysicalDrive2", r"\\.\PhysicalDrive2"),
        ("//server/share/a.vhdx", r"\\server\share\a.vhdx"),
    ],
)
def test_what_the_hypervisor_is_told(path: str, told: str) -> None:
    """The absolute path with backslashes, its case as given."""
    folders = {**FOLDERS, "d:": FOLDERS["D:"]}
    rules = Windows(current=folders.__getitem__, resolve=lambda path: path)
    assert rules.locate(path) == (told, told)


def test_short_names_and_links_are_resolved() -> None:
    """Where the system says what they lead to; where it cannot say, the path stands."""

    def resolve(path: str) -> str:
        if "~" not in path:
            raise PermissionError(13, "no telling", path)
        return path.replace("PROGRA~1", "Program Files")

    rules = Windows(current=FOLDERS.__getitem__, resolve=resolve)
    assert rules.locate(r"C:\PROGRA~1\a")[1] == r"C:\Program Files\a"
    assert rules.locate(r"C:\other\a")[1] == r"C:\other\a"


def test_a_disk_is_not_opened_to_resolve_links() -> None:
    """There are none in a device."""

    def resolve(path: str) -> str:
        raise AssertionError(path)

    name = r"\\.\PhysicalDrive2"
    assert Windows(current=FOLDERS.__getitem__, resolve=resolve).locate(name) == (name, name)


@pytest.mark.parametrize(
    ("path", "there"),
    [
        (r"C:\disks\a.vhdx", r"E:\new\a.vhdx"),
        (r"\\?\c:\DISKS\Sub\A.vhdx", r"E:\new\Sub\A.vhdx"),
        (r"C:\disks\one.vhdx", r"F:\1.vhdx"),
        (r"C:\disks2\a.vhdx", r"C:\disks2\a.vhdx"),
        (r"\\SERVER\share\a.vhdx", r"G:\a.vhdx"),
        (r"Z:\a.vhdx", r"Y:\a.vhdx"),
    ],
)
def test_where_a_path_of_windows_has_moved(path: str, there: str) -> None:
    """Found in any spelling; the names below keep theirs."""
    paths = {
        "c:/Disks/": "E:\\new\\",
        r"C:\disks\ONE.vhdx": r"F:\1.vhdx",
        r"\\server\share": "G:",
        "Z:\\": "Y:\\",
    }
    assert moved(path, paths, WINDOWS) == there


@pytest.mark.skipif(os.name == "nt", reason="these are the other rules; see the rest of this file")
def test_here_paths_mean_what_they_say(tmp_path: Path) -> None:
    """Byte for byte, and by the numbers of what exists."""
    assert isinstance(HERE, Posix)
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "link").symlink_to("a")
    said = os.stat(tmp_path / "a")
    assert identify(tmp_path / "link") == (
        str(tmp_path / "link"),
        str(tmp_path / "a"),
        ("file", said.st_dev, said.st_ino),
    )
    for name in ("B", "b", "b.", "b ", r"C:\b", r"\\?\C:\b"):
        path = str(tmp_path / name)
        assert identify(path) == (path, path, ("path", path, ""))
        assert HERE.fold(path) == path


def test_a_suffix_is_the_last_names() -> None:
    """Of either system."""
    assert Posix().suffix("/a.b/C.VHDX") == WINDOWS.suffix(r"C:\a.b\C.VHDX") == ".vhdx"
    assert Posix().suffix("/a.b/c") == WINDOWS.suffix(r"C:\a.b\c") == ""
    assert ntpath.splitext(r"C:\a.b\c")[1] == ""


def attached(table: AttachmentTable, path: str) -> DiskState:
    """A disk that is attached by this path on Windows."""
    request = virtual_disk(path, False, None, WINDOWS)
    state = DiskState(Attachment(Slot(0, 0), request.disk, "h1"), request.identity)
    table.add(state)
    return state


def test_one_disk_of_windows_is_attached_once() -> None:
    """However it is spelt when it is asked for again; and is gone by any spelling after that."""
    table = AttachmentTable(WINDOWS)
    state = attached(table, r"C:\vm\A.vhdx")
    again = virtual_disk("//?/c:/VM/a.VHDX", False, None, WINDOWS)
    assert table.find(again) is state
    table.check_sharing(state, again)
    table.remove(state)
    assert table.find(again) is None
    assert again.disk.format is ImageFormat.VHDX


def test_a_path_of_windows_that_names_another_file_now() -> None:
    """Is a conflict, in another case too; and is none while it names no file at all."""
    table = AttachmentTable(WINDOWS)
    state = attached(table, r"C:\vm\a.vhdx")
    request = virtual_disk(r"c:\VM\A.vhdx", False, None, WINDOWS)
    other = request._replace(identity=WINDOWS.identity(request.disk.path, status(number=5)))
    assert table.find(other) is state
    with pytest.raises(DiskConflictError, match="names another file"):
        table.check_sharing(state, other)
    state.identity = other.identity
    table.check_sharing(state, request)


def test_two_disks_of_windows_are_two() -> None:
    """Of one sort, on one machine, with the same zeros for numbers."""
    table = AttachmentTable(WINDOWS)
    one, two = (physical_disk(rf"\\.\PhysicalDrive{n}", False, WINDOWS) for n in (1, 2))
    state = DiskState(Attachment(Slot(0, 0), one.disk, "h1"), one.identity)
    table.add(state)
    assert table.find(two) is None
    assert table.find(physical_disk(r"\\?\PHYSICALDRIVE1", False, WINDOWS)) is state
