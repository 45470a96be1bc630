"""Links on the way to a folder: root's are followed, those of others are told of."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from hotlun.agent import ways
from hotlun.agent.errors import RequestError
from hotlun.agent.kernel import Kernel
from hotlun.agent.places import Places

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can have others own folders"),
]

GUEST = 1000
"""A user of the guest."""


def reached(folder: Path) -> tuple[str, tuple[str, ...]]:
    """Where a path leads, what is missing there; by a descriptor of just that."""
    found, where, missing = ways.reach(str(folder), "m0")
    try:
        assert os.fstat(found).st_ino == os.stat(where).st_ino
    finally:
        os.close(found)
    return where, missing


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """Where a guest's user wants root to work."""
    etc = tmp_path / "etc"
    (etc / "victim").mkdir(parents=True)
    return etc


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, GUEST, GUEST)
    return home


@pytest.mark.parametrize("below", ["", "victim", "victim/more"])
@pytest.mark.parametrize("owner", [0, GUEST])
def test_a_link_in_a_users_folder_is_not_followed(
    home: Path, etc: Path, below: str, owner: int
) -> None:
    """Whosever it is, as the user can have moved it there; the words say which, and where to."""
    link = home / "disks"
    link.symlink_to(etc)
    os.chown(link, owner, owner, follow_symlinks=False)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(RequestError) as caught:
        reached(link / below)
    assert f"through {link}, a symbolic link to {etc} that others than root" in str(caught.value)
    with pytest.raises(RequestError, match="it is not followed"):
        Places(Kernel()).claim(str(link / below / "m0"))
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert list((etc / "victim").iterdir()) == []


@pytest.mark.parametrize("shared", [0o775, 0o757, 0o777])
def test_a_folder_that_others_can_write_is_as_a_users(
    tmp_path: Path, etc: Path, shared: int
) -> None:
    """Though root owns it."""
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "link").symlink_to(etc)
    assert reached(folder / "link") == (str(etc), ("m0",))
    folder.chmod(shared)
    with pytest.raises(RequestError, match=f"through {folder}/link, a symbolic link"):
        reached(folder / "link")


def test_in_a_sticky_folder_the_owner_counts(tmp_path: Path, etc: Path) -> None:
    """As in /tmp, where nobody else can remove or rename what is root's."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    link = folder / "link"
    link.symlink_to(etc)
    assert reached(link / "victim") == (str(etc / "victim"), ("m0",))
    os.chown(link, GUEST, GUEST, follow_symlinks=False)
    with pytest.raises(RequestError, match="not followed"):
        reached(link / "victim")


def test_roots_links_below_what_others_can_move_are_not_followed(home: Path, etc: Path) -> None:
    """They can have it lie there, or another of root's folders with another link."""
    (home / "mine").mkdir()
    (home / "mine/link").symlink_to(etc)
    with pytest.raises(RequestError, match=f"through {home}/mine/link"):
        reached(home / "mine/link")


def test_a_users_folder_without_links_is_a_folder(home: Path) -> None:
    """Where he has root mount is his own."""
    (home / "disks").mkdir()
    assert reached(home / "disks") == (str(home / "disks"), ("m0",))
    assert reached(home / "disks/a/b") == (str(home / "disks"), ("a", "b", "m0"))


def absolute(root: Path, etc: Path) -> None:
    (root / "link").symlink_to(etc)


def relative(root: Path, etc: Path) -> None:
    (root / "link").symlink_to(".//a/../etc/.")
    (root / "a").mkdir()


def chained(root: Path, etc: Path) -> None:
    (root / "link").symlink_to("other")
    (root / "other").symlink_to(etc)


def above(root: Path, etc: Path) -> None:
    (root / "a").mkdir()
    (root / "a/up").symlink_to("../etc")
    (root / "link").symlink_to("a/up")


@pytest.mark.parametrize("make", [absolute, relative, chained, above])
def test_roots_links_are_followed(
    tmp_path: Path, etc: Path, make: Callable[[Path, Path], None]
) -> None:
    """Wherever they lead, as the kernel does; also to what is missing there."""
    make(tmp_path, etc)
    assert reached(tmp_path / "link") == (str(etc), ("m0",))
    assert reached(tmp_path / "link/victim") == (str(etc / "victim"), ("m0",))
    assert reached(tmp_path / "link/new/er") == (str(etc), ("new", "er", "m0"))


def test_a_users_link_behind_roots_is_not_followed(tmp_path: Path, home: Path, etc: Path) -> None:
    """Each one on the way counts."""
    (tmp_path / "link").symlink_to(home)
    (home / "disks").symlink_to(etc)
    with pytest.raises(RequestError, match=f"{tmp_path}/link/disks leads through {home}/disks, "):
        reached(tmp_path / "link/disks")


def test_a_link_to_itself_is_an_error(tmp_path: Path) -> None:
    """In the kernel's words."""
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(RequestError, match="link cannot be entered: Too many levels"):
        reached(tmp_path / "link")


def test_the_guests_own_links_are_followed() -> None:
    """/var/run, where a guest has it; it is root's, on every system."""
    if not stat.S_ISLNK(os.lstat("/var/run").st_mode):
        pytest.skip("/var/run is no link here")
    found, where, missing = ways.reach("/var/run")
    os.close(found)
    assert (where, missing) == ("/run", ())
