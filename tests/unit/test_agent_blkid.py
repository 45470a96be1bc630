"""libblkid and the built-in magic numbers say the same of every kind of disk."""

from __future__ import annotations

import os
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest
from support.guest import image_of
from support.images import IMAGES, iso9660, write

from hotlun.agent import blkid, superblocks
from hotlun.agent.blkid import Content

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A guest that has no libblkid."""
    with monkeypatch.context() as patch:
        patch.setattr(blkid, "_LIBRARY", "libblkid-that-is-not-there.so.1")
        blkid._library.cache_clear()
        yield
    blkid._library.cache_clear()


def probe(path: Path) -> Content:
    device = os.open(path, os.O_RDONLY)
    try:
        content = blkid.probe(device)
    finally:
        os.close(device)
    assert content is not None
    return content


@pytest.mark.parametrize("name", IMAGES)
def test_the_library_knows_what_the_tools_make(name: str, tmp_path: Path) -> None:
    """One name, and nothing beside it."""
    kind, make = IMAGES[name]
    make(tmp_path / "image")
    assert probe(tmp_path / "image") == Content((kind,) if kind else ())


@pytest.mark.parametrize("name", IMAGES)
def test_with_the_library_the_answer_is_its_own(name: str, tmp_path: Path) -> None:
    """The magic numbers add nothing to it where the disk is sound."""
    kind, make = IMAGES[name]
    make(tmp_path / "image")
    content = superblocks.look(str(tmp_path / "image"))
    assert content.names[:1] == ((kind,) if kind else ())
    assert not content.ambivalent
    assert superblocks.detect(str(tmp_path / "image")) == kind


@pytest.mark.parametrize("name", IMAGES)
def test_without_the_library_the_answer_is_the_same(
    name: str, no_library: None, tmp_path: Path
) -> None:
    """So that a guest's packages do not decide what becomes of its disks."""
    kind, make = IMAGES[name]
    make(tmp_path / "image")
    device = os.open(tmp_path / "image", os.O_RDONLY)
    try:
        assert blkid.probe(device) is None
    finally:
        os.close(device)
    content = superblocks.look(str(tmp_path / "image"))
    assert content.names[:1] == ((kind,) if kind else ())
    assert not content.ambivalent


def test_more_than_one_is_ambivalent(tmp_path: Path) -> None:
    """All are named, and none is called the one."""
    image = image_of(tmp_path / "image", 320, "mkfs.xfs", "-f", "-q")
    other = image_of(tmp_path / "other", 128, "mkfs.btrfs", "-f", "-q")
    write(image, 0x10000, other.read_bytes()[0x10000:0x11000])
    assert probe(image) == Content(("xfs", "btrfs"), ambivalent=True)
    assert superblocks.look(str(image)) == Content(("xfs", "btrfs"), ambivalent=True)


def test_more_than_one_is_ambivalent_without_the_library(no_library: None, tmp_path: Path) -> None:
    """To the magic numbers, too."""
    image = image_of(tmp_path / "image", 320, "mkfs.xfs", "-f", "-q")
    write(image, 0x10040, b"_BHRfS_M")
    assert superblocks.look(str(image)) == Content(("xfs", "btrfs"), ambivalent=True)


def test_a_cd_that_boots_is_a_cd(tmp_path: Path) -> None:
    """With a partition table before it, as disks that can be written to a stick have."""
    image = tmp_path / "image"
    iso9660(image)
    write(image, 446, bytes((0x80, 0, 0, 0, 0x17, 0, 0, 0, 64, 0, 0, 0, 0, 16, 0, 0)))
    write(image, 510, b"\x55\xaa")
    content = superblocks.look(str(image))
    assert content.names[0] == "iso9660"
    assert "dos" in content.names
    assert not content.ambivalent


def test_what_is_behind_a_container_is_named_too(tmp_path: Path) -> None:
    """libblkid's own verdict ends at the LUKS2 header that mkfs.ext4 did not overwrite."""
    image = image_of(
        tmp_path / "image",
        16,
        *("cryptsetup", "luksFormat", "-q", "--type", "luks2", "--luks2-metadata-size", "1m"),
        *("--key-file", "/dev/zero", "--keyfile-size", "16"),
        *("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"),
    )
    lazily = ("-E", "lazy_itable_init=1,nodiscard")
    subprocess.run(["mkfs.ext4", "-F", "-q", *lazily, str(image)], check=True)
    assert probe(image).names == ("crypto_LUKS", "ext4")
    assert superblocks.detect(str(image), ("ext4",)) == "ext4"


def test_a_damaged_superblock_is_still_one(tmp_path: Path) -> None:
    """libblkid does not call it an xfs any more, but nothing may be lost over that."""
    image = image_of(tmp_path / "image", 320, "mkfs.xfs", "-f", "-q")
    write(image, 8, bytes(8))
    assert "xfs" in superblocks.look(str(image)).names


def test_threads_do_not_meet(tmp_path: Path) -> None:
    """Many disks are looked at together."""
    kinds = ("ext4", "xfs", "btrfs", "swap")
    for name in kinds:
        IMAGES[name][1](tmp_path / name)
    wrong: list[str] = []

    def look(name: str) -> None:
        wrong.extend(name for _ in range(50) if probe(tmp_path / name).names != (name,))

    threads = [threading.Thread(target=look, args=(name,)) for name in kinds * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_device_that_is_none_is_an_error(tmp_path: Path) -> None:
    """Not "nothing"."""
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError, match=r"."):
            blkid.probe(reader)
    finally:
        os.close(reader)
        os.close(writer)
