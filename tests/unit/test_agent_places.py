"""Paths that are claimed, and the directories on the way: made, recognised, removed."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from typing import TYPE_CHECKING

import pytest
from support.guest import DEADLINE
from support.mounted import unmount_all

from hotlun.agent import syscalls
from hotlun.agent.errors import RequestError
from hotlun.agent.kernel import Kernel
from hotlun.agent.places import Places

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="what the agent makes is root's"),
]


@pytest.fixture
def places() -> Places:
    return Places(Kernel())


@pytest.fixture
def mountable(tmp_path: Path) -> Iterator[Path]:
    """A directory for mounts, which are gone afterwards."""
    yield tmp_path
    unmount_all(tmp_path)


def make(places: Places, path: Path) -> None:
    with places.claim(str(path)) as place:
        os.close(place.make_directory())


def clear(places: Places, path: Path) -> None:
    with places.claim(str(path)) as place:
        place.clear()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_path_is_claimed_once(places: Places, tmp_path: Path) -> None:
    """By whatever way it is reached, and until it is let go."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with (
        places.claim(str(tmp_path / "link/m0")) as place,
        pytest.raises(RequestError, match="another request"),
        places.claim(str(tmp_path / "real/m0")),
    ):
        pass
    assert place.path == str(tmp_path / "real/m0")
    make(places, tmp_path / "real/m0")


def test_what_is_made_is_marked_and_removed(places: Places, tmp_path: Path) -> None:
    """By a mode that nobody else gives a directory; any later agent knows it."""
    path = tmp_path / "run/scsi/m0"
    make(places, path)
    for made in (path, path.parent, path.parent.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o1700
    clear(Places(Kernel()), path)
    assert list(tmp_path.iterdir()) == []


def test_a_group_that_is_inherited_is_no_matter(places: Places, tmp_path: Path) -> None:
    """Below a folder that gives its group on, directories get that bit, too."""
    tmp_path.chmod(0o2755)
    make(places, tmp_path / "run/m0")
    assert (tmp_path / "run").stat().st_mode & stat.S_ISGID
    clear(places, tmp_path / "run/m0")
    assert list(tmp_path.iterdir()) == []


def test_what_was_half_removed_goes_for_good(places: Places, tmp_path: Path) -> None:
    """An agent was killed between the directory and the one above it."""
    make(places, tmp_path / "a/b/c/m0")
    (tmp_path / "a/b/c/m0").rmdir()
    (tmp_path / "a/b/c").rmdir()
    clear(places, tmp_path / "a/b/c/m0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["empty", "full", "another's", "link", "file"])
def test_what_is_not_ours_stays(places: Places, tmp_path: Path, kind: str) -> None:
    """Also if it is empty, and what is ours but holds something."""
    path = tmp_path / "m0"
    if kind == "link":
        path.symlink_to(tmp_path)
    elif kind == "file":
        path.write_text("")
    else:
        path.mkdir()
        if kind != "empty":
            path.chmod(0o1700)
        if kind == "full":
            (path / "file").write_text("")
        if kind == "another's":
            os.chown(path, 65534, 65534)
    before = path.lstat().st_ino
    clear(places, path)
    assert path.lstat().st_ino == before


def test_siblings_keep_what_is_above_them(places: Places, tmp_path: Path) -> None:
    """The folder goes with the last of them."""
    make(places, tmp_path / "run/m0")
    make(places, tmp_path / "run/m1")
    clear(places, tmp_path / "run/m0")
    assert (tmp_path / "run/m1").is_dir()
    clear(places, tmp_path / "run/m1")
    assert list(tmp_path.iterdir()) == []


def test_a_claimed_directory_is_nobody_elses_to_remove(places: Places, tmp_path: Path) -> None:
    """It is about to be mounted on, while what was below it goes."""
    with places.claim(str(tmp_path / "m0")) as place:
        os.close(place.make_directory())
        make(places, tmp_path / "m0/below")
        clear(places, tmp_path / "m0/below")
        assert (tmp_path / "m0").is_dir()
        assert not (tmp_path / "m0/below").exists()


def test_a_folder_that_goes_meanwhile_is_made_again(places: Places, tmp_path: Path) -> None:
    """Its last mount was unmounted while ours waited for its disk."""
    make(places, tmp_path / "run/m0")
    with places.claim(str(tmp_path / "run/m1")) as place:
        assert place.parent is not None
        clear(places, tmp_path / "run/m0")
        assert not (tmp_path / "run").exists()
        os.close(place.make_directory())
        assert place.is_reached()
    assert (tmp_path / "run/m1").is_dir()


def test_a_storm_of_siblings(places: Places, tmp_path: Path) -> None:
    """Some make what others remove: nobody fails, and nothing stays."""
    failures: list[Exception] = []

    def come_and_go(number: int) -> None:
        path = tmp_path / f"run/scsi/{number}"
        try:
            for _ in range(100):
                with places.claim(str(path)) as place:
                    place.stack()
                    os.close(place.make_directory())
                    place.clear()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(tmp_path.iterdir()) == []


def test_a_storm_of_paths_below_one_another(places: Places, tmp_path: Path) -> None:
    """What was made for one path is there until it is let go, whoever removes what was below."""
    failures: list[Exception] = []

    def come_and_go(path: Path) -> None:
        try:
            for _ in range(200):
                with places.claim(str(path)) as place:
                    directory = place.make_directory()
                    try:
                        assert os.fstat(directory).st_ino == path.stat().st_ino
                        assert place.is_reached()
                    finally:
                        os.close(directory)
                    place.clear()
        except Exception as error:
            failures.append(error)

    paths = [tmp_path / path for path in ("a", "a/b", "a/b/c", "a/b/c/d")]
    threads = [threading.Thread(target=come_and_go, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_hangs_stops_nobody_else(places: Places, mountable: Path) -> None:
    """A FUSE whose server does not answer: what is asked for on it waits, and nothing beside."""
    if not syscalls.knows_filesystem("fuse"):
        pytest.skip("this kernel has no FUSE, of which one hangs here")
    hung, server = mountable / "hung", os.open("/dev/fuse", os.O_RDWR)
    failed: list[RequestError] = []

    def wait_for_ever() -> None:
        with places.claim(str(hung / "run/m0")) as place:
            hung.mkdir()
            words = f"fd={server},rootmode=40000,user_id=0,group_id=0"
            syscalls.mount("hung", str(hung), "fuse", 0, words)
            begun.set()
            try:
                place.make_directory()
            except RequestError as error:
                failed.append(error)

    def come_and_go() -> None:
        for name in ("m0", "run/m1", "run/m2"):
            make(places, mountable / name)
            clear(places, mountable / name)

    begun = threading.Event()
    waiting = threading.Thread(target=wait_for_ever)
    others = threading.Thread(target=come_and_go)
    try:
        waiting.start()
        assert begun.wait(DEADLINE)
        waiting.join(0.1)
        others.start()
        others.join(DEADLINE)
        assert not others.is_alive()
        assert waiting.is_alive()
    finally:
        os.close(server)  # which has the kernel give up
        waiting.join()
        others.join()
    assert len(failed) == 1
    syscalls.unmount(str(hung))
    assert list(mountable.iterdir()) == [hung]


def test_what_cannot_be_made_leaves_nothing(places: Places, tmp_path: Path) -> None:
    """The folders that were, go."""
    name = "x" * 300
    with pytest.raises(RequestError, match="x cannot be made: File name too long"):
        make(places, tmp_path / "run" / name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_named(places: Places, tmp_path: Path) -> None:
    """It is no directory, and stays what it is."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RequestError, match=f"^{tmp_path}/file exists already and is no directory"):
        make(places, tmp_path / "file/m0")
    assert (tmp_path / "file").read_text() == "mine"


def test_no_descriptor_is_left(places: Places, tmp_path: Path) -> None:
    """Whatever happened to the place."""
    (tmp_path / "file").write_text("")
    before = open_descriptors()
    for path in (tmp_path / "run/m0", tmp_path / "file/m0", tmp_path / "m0"):
        with contextlib.suppress(RequestError), places.claim(str(path)) as place:
            assert place.stack() == []
            os.close(place.make_directory())
            assert place.stack() == []
            assert place.label() == b""
            place.clear()
    assert open_descriptors() == before


def test_a_label_is_seen_below_a_mount(places: Places, mountable: Path) -> None:
    """It is the directory's, not that of what is mounted on it; clearing takes it away."""
    path = mountable / "m0"
    path.mkdir()
    with places.claim(str(path)) as place:
        directory = place.make_directory()
        place.set_label(directory, b"as asked")
        os.close(directory)
        syscalls.mount("over", str(path), "tmpfs", 0)
        assert place.label() == b"as asked"
        assert [mount.source for mount in place.stack() or ()] == ["over"]
        assert "trusted.hotlun" not in os.listxattr(path)
        syscalls.unmount(place.target)
        place.clear()
        assert place.label() == b""
    assert path.is_dir()
    assert os.listxattr(path) == []


@pytest.mark.parametrize("where", ["ramfs", "unbindable"])
def test_without_a_label_there_is_none(places: Places, mountable: Path, where: str) -> None:
    """Some filesystems keep none, and what must not be mounted twice cannot be looked below."""
    syscalls.mount(where, str(mountable), "ramfs" if where == "ramfs" else "tmpfs", 0)
    if where == "unbindable":
        syscalls.mount("", str(mountable), "", 1 << 17)
    try:
        with places.claim(str(mountable / "m0")) as place:
            directory = place.make_directory()
            place.set_label(directory, b"as asked")
            os.close(directory)
            assert place.label() == b""
            place.clear()
            assert list(mountable.iterdir()) == []
    finally:
        syscalls.unmount(str(mountable))


class Swapped:
    """A folder, once it is a link to where its owner wants root to work."""

    def __init__(self, root: Path) -> None:
        self.folder, self.away = root / "home/folder", root / "home/away"
        self.victim = root / "victim"
        self.victim.mkdir()
        self.folder.mkdir(parents=True)

    def swap(self) -> None:
        self.folder.rename(self.away)
        self.folder.symlink_to(self.victim)


@pytest.mark.parametrize("below", ["m0", "deep/er/m0"])
def test_a_folder_that_becomes_a_link_is_not_followed(
    places: Places, tmp_path: Path, below: str
) -> None:
    """It is worked in where it is now, never where the link leads."""
    swapped = Swapped(tmp_path)
    with places.claim(str(swapped.folder / below)) as place:
        swapped.swap()
        os.close(place.make_directory())
        assert (swapped.away / below).is_dir()
        assert not place.is_reached()
        place.clear()
    assert list(swapped.victim.iterdir()) == []
    assert list(swapped.away.iterdir()) == []


def test_a_link_in_the_place_of_a_removed_folder_is_not_followed(
    places: Places, tmp_path: Path
) -> None:
    """The way is walked again, and ends there."""
    swapped = Swapped(tmp_path)
    with places.claim(str(swapped.folder / "m0")) as place:
        swapped.swap()
        swapped.away.rmdir()
        with pytest.raises(RequestError, match="folder exists already and is no directory"):
            place.make_directory()
    assert list(swapped.victim.iterdir()) == []


def test_a_link_to_nowhere_is_no_directory(places: Places, tmp_path: Path) -> None:
    """What it leads to is not made."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RequestError, match=f"{tmp_path}/link exists already and is no directory"):
        make(places, tmp_path / "link/m0")
    clear(places, tmp_path / "link/m0")
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_called_deleted_is_one(places: Places, tmp_path: Path) -> None:
    """The kernel says so of what is removed; of what is only called so, too."""
    (tmp_path / "run (deleted)").mkdir()
    with places.claim(str(tmp_path / "run (deleted)/m0")) as place:
        assert place.path == str(tmp_path / "run (deleted)/m0")
        assert place.is_reached()


def test_what_is_removed_is_not_where_a_link_leads(places: Places, tmp_path: Path) -> None:
    """Even if it looks just like it there."""
    swapped = Swapped(tmp_path)
    twin = swapped.victim / "m0"
    twin.mkdir()
    twin.chmod(0o1700)
    os.setxattr(twin, "trusted.hotlun", b"mine")
    make(places, swapped.folder / "m0")
    with places.claim(str(swapped.folder / "m0")) as place:
        assert place.stack() == []
        swapped.swap()
        place.clear()
    assert twin.is_dir()
    assert os.getxattr(twin, "trusted.hotlun") == b"mine"
    assert not (swapped.away / "m0").exists()


def test_an_owner_who_never_stops_gets_nothing(places: Places, tmp_path: Path) -> None:
    """Folder, link, folder, link, as fast as it goes: the victim is never worked in."""
    swapped = Swapped(tmp_path)
    stop = threading.Event()

    def attack() -> None:
        folder, away = swapped.folder, swapped.away
        steps = (
            lambda: folder.rename(away),
            lambda: folder.symlink_to(swapped.victim),
            folder.unlink,
            lambda: away.rename(folder),
        )
        while not stop.is_set():
            for step in steps:
                with contextlib.suppress(OSError):  # the agent made a folder where none was
                    step()

    attacker = threading.Thread(target=attack)
    attacker.start()
    done = 0
    try:
        for _ in range(500):
            with (
                contextlib.suppress(RequestError),
                places.claim(str(swapped.folder / "run/m0")) as place,
            ):
                if place.path != str(swapped.folder / "run/m0"):
                    continue  # it was a link before it was claimed: that is where it leads
                os.close(place.make_directory())
                done += 1
                place.clear()
            assert list(swapped.victim.iterdir()) == []
    finally:
        stop.set()
        attacker.join()
    assert done
