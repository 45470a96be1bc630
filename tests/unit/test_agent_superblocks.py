"""What is on a device is told by its magic numbers, and not reading it is not "nothing"."""

from __future__ import annotations

import struct
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, strategies
from support.guest import image_of

from hotlun.agent import superblocks

if TYPE_CHECKING:
    from pathlib import Path

TOOLS = {
    "ext2": ("mkfs.ext2", "-F", "-q"),
    "ext3": ("mkfs.ext3", "-F", "-q"),
    "ext4": ("mkfs.ext4", "-F", "-q"),
    "jbd": ("mkfs.ext4", "-F", "-q", "-O", "journal_dev"),
    "xfs": ("mkfs.xfs", "-f", "-q"),
    "btrfs": ("mkfs.btrfs", "-f", "-q"),
    "vfat": ("mkfs.vfat",),
    "swap": ("mkswap", "-q"),
}


@pytest.mark.parametrize("name", TOOLS)
def test_what_a_real_tool_made_is_recognised(name: str, tmp_path: Path) -> None:
    """Each kind that mkfs can make here is told from the others."""
    image = image_of(tmp_path / "image", 320, *TOOLS[name])
    assert superblocks.detect(str(image)) == name


def test_an_ext4_without_a_journal_is_ext4(tmp_path: Path) -> None:
    """It has features that ext2 does not know."""
    image = image_of(tmp_path / "image", 16, "mkfs.ext4", "-F", "-q", "-O", "^has_journal")
    assert superblocks.detect(str(image)) == "ext4"


def test_an_erofs_is_recognised(tmp_path: Path) -> None:
    """The guest's own root is one."""
    (tmp_path / "tree").mkdir()
    image = tmp_path / "image"
    command = ["mkfs.erofs", "--quiet", str(image), str(tmp_path / "tree")]
    subprocess.run(command, check=True, capture_output=True)
    assert superblocks.detect(str(image)) == "erofs"


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
    assert superblocks.identify(bytes(offset) + magic + bytes(0x11000)) == name


def test_a_partition_table_is_one_only_with_sound_entries() -> None:
    """A boot sector alone is no table: vfat has one too."""
    entry = bytes((0x80, 0, 0, 0, 0x83, 0, 0, 0)) + struct.pack("<II", 2048, 4096)
    sector = bytes(446) + entry + bytes(48) + b"\x55\xaa"
    assert superblocks.identify(sector) == "dos"
    assert superblocks.identify(bytes(510) + b"\x55\xaa") == ""
    assert superblocks.identify(bytes(446) + b"\x7f" + entry[1:] + bytes(48) + b"\x55\xaa") == ""


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
    with image.open("wb") as file:
        file.truncate(8 << 20)
        file.seek(offset)
        file.write(struct.pack("<I", 0xA92B4EFC))
    assert superblocks.detect(str(image)) == "linux_raid_member"


def test_a_device_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """Calling it empty would have it formatted."""
    with pytest.raises(OSError, match="directory"):
        superblocks.detect(str(tmp_path))


@given(strategies.binary(max_size=4096), strategies.integers(0, 0x10000))
def test_any_bytes_are_taken(content: bytes, offset: int) -> None:
    """Whatever is there, there is an answer."""
    assert isinstance(superblocks.identify(bytes(offset) + content), str)
