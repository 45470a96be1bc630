"""The cache: entries appear whole, are built once, and the oldest make room."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from hotlun.vm.cache import Shelf, cache_directory, fingerprint, locked

DEADLINE = 20.0


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hotlun"


def put(shelf: Shelf, key: str, text: str = "") -> str:
    """Put an entry with one file on the shelf."""
    with shelf.building(key) as directory:
        Path(directory, "file").write_text(text, encoding="utf-8")
        return shelf.finish(key, directory)


def test_the_directory_follows_the_xdg_specification(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An absolute XDG_CACHE_HOME counts, a relative one does not."""
    assert cache_directory() == str(cache)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == str(tmp_path / "home/.cache/hotlun")


def test_a_fingerprint_tells_parts_from_their_sum() -> None:
    """Where one part ends and the next begins makes a difference."""
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint("ab", "c") == fingerprint(b"ab", b"c")


def test_an_entry_appears_when_it_is_whole() -> None:
    """While it is being built nobody finds it; a build that fails leaves nothing."""
    shelf = Shelf("things", keep=3)
    with pytest.raises(ZeroDivisionError), shelf.building("one") as directory:
        assert shelf.find("one") is None
        raise ZeroDivisionError
    assert not Path(directory).exists()
    entry = put(shelf, "one", "whole")
    assert shelf.find("one") == entry
    assert Path(entry, "file").read_text(encoding="utf-8") == "whole"


def test_a_killed_builders_litter_is_removed_by_the_next() -> None:
    """Only that of the same entry: another one may be being built."""
    shelf = Shelf("things", keep=3)
    mine, other = (Path(shelf.directory, f".building-{key}-dead") for key in ("one", "two"))
    mine.mkdir()
    other.mkdir()
    put(shelf, "one")
    assert not mine.exists()
    assert other.exists()


def test_the_least_recently_used_go() -> None:
    """Finding an entry is using it."""
    shelf = Shelf("things", keep=2)
    for age, key in enumerate(("new", "old", "older")):
        os.utime(put(Shelf("things", keep=9), key), (1000 - age, 1000 - age))
    assert shelf.find("older")
    put(shelf, "newest")
    assert shelf.find("newest")
    assert shelf.find("older")
    assert shelf.find("new") is None
    assert shelf.find("old") is None


def test_discarding_what_is_not_there_is_no_error() -> None:
    """Two who find the same entry broken may both throw it away."""
    shelf = Shelf("things", keep=2)
    put(shelf, "one")
    shelf.discard("one")
    shelf.discard("one")
    assert shelf.find("one") is None


async def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    """Others wait for it, and can be cancelled while they do."""
    path = str(tmp_path / "lock")
    order = []

    async def hold(name: str) -> None:
        async with locked(path):
            order.append(name)
            await asyncio.sleep(0.01)
            order.append(name)

    async with locked(path):
        waiting = asyncio.create_task(hold("cancelled"))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    async with asyncio.timeout(DEADLINE):
        await asyncio.gather(hold("one"), hold("two"))
    assert order in (["one", "one", "two", "two"], ["two", "two", "one", "one"])
