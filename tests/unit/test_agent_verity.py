"""What lies behind a filesystem is read with suspicion: it is the host's until a hash says else."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest
from support.disks import MIB, ext4
from support.guest import FakeGuest, no_mapped_devices

from hotlun.agent import verity
from hotlun.agent.block_devices import BlockDevice
from hotlun.agent.devmapper import DeviceMapper
from hotlun.agent.errors import RequestError
from hotlun.agent.mappings import Layers, Mappings
from hotlun.agent.settings import Slot, Verity

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 16 * MIB
HASH = "ab" * 32


def device(path: Path) -> BlockDevice:
    return BlockDevice(Slot(0, 1), "sda", str(path), "8:0", "/sys/block/sda")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An ext4 with veritysetup's tree right behind it."""
    path = ext4(tmp_path / "disk.raw", "note", SIZE)
    subprocess.run(
        [
            *("veritysetup", "format", f"--hash-offset={SIZE}", f"--data-blocks={SIZE // 4096}"),
            *(path, path),
        ],
        check=True,
        capture_output=True,
    )
    return path


@pytest.fixture
def mappings(tmp_path: Path) -> Iterator[Mappings]:
    """A kernel whose device mapper refuses all: whoever comes to it has passed our checks."""
    guest = FakeGuest(tmp_path / "guest")
    yield Mappings(guest.kernel, DeviceMapper(guest.kernel, no_mapped_devices), guest.uevents)
    guest.close()


def test_the_tree_behind_an_ext4_is_found(image: Path) -> None:
    """By the filesystem's size; the header says how it is built."""
    assert verity._filesystem_size(device(image)) == SIZE
    header = verity._header(device(image), SIZE)
    assert header[:5] == (1, "sha256", 4096, 4096, SIZE // 4096)
    assert re.fullmatch("[0-9a-f]{64}", header.salt)


def test_behind_an_erofs_too(tmp_path: Path) -> None:
    """Whose image is as long as its superblock says."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "note").write_text("here")
    path = tmp_path / "disk.erofs"
    subprocess.run(["mkfs.erofs", path, files], check=True, capture_output=True)
    assert verity._filesystem_size(device(path)) == path.stat().st_size


def test_what_holds_no_known_filesystem_needs_an_offset(tmp_path: Path) -> None:
    """And is told so."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    with pytest.raises(RequestError, match="say where its verity tree lies"):
        verity._filesystem_size(device(path))


def test_without_a_header_nothing_is_made(mappings: Mappings, tmp_path: Path) -> None:
    """The error says where it was looked for."""
    path = ext4(tmp_path / "disk.raw", size=SIZE)
    layers = Layers.over(Slot(0, 1), 0)
    with pytest.raises(RequestError, match=f"no verity header at {SIZE - 4096}"):
        verity.open_verified(mappings, layers, device(path), Verity(HASH, SIZE - 4096))


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (8, b"\2"),  # version
        (12, b"\7"),  # hash type
        (32, b"sha256 ignore_corruption\0"),  # more words for the kernel's table
        (32, b"\xff\0"),
        (64, b"\1\0\0\0"),  # data block size
        (68, b"\0\0\0\0"),
        (72, bytes(8)),  # no data
        (80, b"\1\1"),  # salt longer than there is room for
    ],
)
def test_a_header_that_makes_no_sense_is_refused(
    mappings: Mappings, image: Path, offset: int, value: bytes
) -> None:
    """Before the kernel hears of it."""
    with image.open("r+b") as file:
        file.seek(SIZE + offset)
        file.write(value)
    with pytest.raises(RequestError, match="makes no sense"):
        verity.open_verified(mappings, Layers.over(Slot(0, 1), 0), device(image), Verity(HASH, 0))


def test_data_that_reaches_into_the_tree_is_refused(mappings: Mappings, image: Path) -> None:
    """The tree would be what it proves."""
    with image.open("r+b") as file:
        file.seek(SIZE + 72)
        file.write((SIZE // 4096 + 1).to_bytes(8, "little"))
    with pytest.raises(RequestError, match="claims more data"):
        verity.open_verified(mappings, Layers.over(Slot(0, 1), 0), device(image), Verity(HASH, 0))


def test_what_makes_sense_goes_to_the_kernel(mappings: Mappings, image: Path) -> None:
    """Which has the last word."""
    with pytest.raises(RequestError, match="hotlun-0-1-p0-verity could not be made"):
        verity.open_verified(mappings, Layers.over(Slot(0, 1), 0), device(image), Verity(HASH, 0))
