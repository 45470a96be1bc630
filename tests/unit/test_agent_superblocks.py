"""What is on a device is told by its magic numbers, and not reading it is not "nothing"."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, strategies
from support.guest import image_of
from support.images import write

from hotlun.agent import superblocks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.mark.parametrize(
    ("name", "offset", "magic"),
    [
        ("crypto_LUKS", 0, b"LUKS\xba\xbe\0\2"),
        ("LVM2_member", 536, b"LVM2 001"),
        ("linux_raid_member", 4096, struct.pack("<I", 0xA92B4EFC)),
        ("squashfs", 0, b"hsqs"),
        ("iso9660", 0x8001, b"CD001"),
        ("gpt", 512, b"EFI PART"),
        ("ntfs", 3, b"NTFS    "),
    ],
)
def test_a_magic_number_alone_is_enough(name: str, offset: int, magic: bytes) -> None:
    """Kinds that no tool here makes, from what their specifications say."""
    assert superblocks.identify(bytes(offset) + magic + bytes(0x11000)).names == (name,)


def test_a_partition_table_is_one_only_with_sound_entries() -> None:
    """A boot sector alone is no table: vfat has one too."""
    entry = bytes((0x80, 0, 0, 0, 0x83, 0, 0, 0)) + struct.pack("<II", 2048, 4096)
    sector = bytes(446) + entry + bytes(48) + b"\x55\xaa"
    assert superblocks.identify(sector).names == ("dos",)
    assert superblocks.identify(bytes(510) + b"\x55\xaa").names == ()
    unsound = bytes(446) + b"\x7f" + entry[1:] + bytes(48) + b"\x55\xaa"
    assert superblocks.identify(unsound).names == ()


@pytest.mark.parametrize("size", [0, 1, 512, 4096, 1 << 20])
def test_an_empty_device_is_empty_whatever_its_size(size: int, tmp_path: Path) -> None:
    """Reading stops at its end."""
    image = tmp_path / "image"
    image.write_bytes(bytes(size))
    assert superblocks.detect(str(image)) == ""


@pytest.mark.parametrize("offset", [(8 << 20) - 0x10000, (8 << 20) - 0x2000])
def test_marks_at_the_end_are_found(offset: int, tmp_path: Path) -> None:
    """RAID with old metadata leaves the start to what is inside."""
    image = tmp_path / "image"
    write(image_of(image, 8), offset, struct.pack("<I", 0xA92B4EFC))
    assert superblocks.detect(str(image)) == "linux_raid_member"


def test_an_xfs_that_was_never_finished_is_no_xfs(tmp_path: Path) -> None:
    """Its superblock says so until mkfs.xfs is done; libblkid does not look there."""
    image = image_of(tmp_path / "image", 320, "mkfs.xfs", "-f", "-q")
    write(image, 0x7E, b"\1")
    assert superblocks.look(str(image)).names == ("unfinished xfs",)


def test_a_btrfs_that_was_never_finished_is_no_btrfs(tmp_path: Path) -> None:
    """mkfs.btrfs gives it another magic number until it is done."""
    image = image_of(tmp_path / "image", 128, "mkfs.btrfs", "-f", "-q")
    write(image, 0x10040, b"!")
    assert superblocks.look(str(image)).names == ("unfinished btrfs",)


@pytest.mark.parametrize("name", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("turn", range(3))
def test_a_killed_mkfs_leaves_what_is_whole_or_not_called_so(
    name: str, turn: int, tmp_path: Path
) -> None:
    """Killed at some moment; what passes for a filesystem then is sound to its checker."""
    checkers = {
        "ext4": ("e2fsck", "-f", "-n"),
        "xfs": ("xfs_repair", "-n"),
        "btrfs": ("btrfs", "check"),
    }
    image = image_of(tmp_path / "image", 320)
    maker = [f"mkfs.{name}", "-F" if name == "ext4" else "-f", "-q", str(image)]
    process = subprocess.Popen(maker)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.002 * (turn + 1))
    process.kill()
    process.wait()
    if name in superblocks.look(str(image)).names:
        subprocess.run([*checkers[name], str(image)], check=True, capture_output=True)


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A disk of 16 MiB and the file behind it; what the file lacks cannot be read."""
    image = image_of(tmp_path / "image", 16)
    command = ["losetup", "--find", "--show", str(image)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    node = done.stdout.strip()
    yield node, image
    subprocess.run(["losetup", "--detach", node], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root")
@pytest.mark.parametrize("readable", [0, 4096, 0x10000, 0x20000, 1 << 19, (16 << 20) - 0x10000])
def test_what_cannot_be_read_is_never_blank(failing: tuple[str, Path], readable: int) -> None:
    """Wherever the errors begin: at the start, at the end, or in between."""
    node, image = failing
    os.truncate(image, readable)
    with pytest.raises(OSError, match="Input/output error"):
        superblocks.look(node)


def test_a_device_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """Calling it empty would have it formatted."""
    with pytest.raises(OSError, match="directory"):
        superblocks.detect(str(tmp_path))


@given(strategies.binary(max_size=4096), strategies.integers(0, 0x10000))
def test_any_bytes_are_taken(content: bytes, offset: int) -> None:
    """Whatever is there, there is an answer."""
    superblocks.identify(bytes(offset) + content, content, offset + len(content))
