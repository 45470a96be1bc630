"""A filesystem is made where it is wanted, and where nothing is lost by it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.guest import image_of
from support.images import IMAGES, raid, write

from hotlun.agent import blkid, filesystems, superblocks
from hotlun.agent.block_devices import BlockDevice
from hotlun.agent.errors import RequestError
from hotlun.agent.kernel import Kernel
from hotlun.agent.settings import Slot
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root"),
]

KERNEL = Kernel()
NOT_BLANK = [name for name, (kind, _) in IMAGES.items() if kind]
SERVED = {"ext4": ("ext2", "ext3", "ext4"), "xfs": ("xfs",), "btrfs": ("btrfs",)}


@contextlib.contextmanager
def disk(image: Path, *options: str) -> Iterator[BlockDevice]:
    """A loop device as a disk in a slot."""
    command = ["losetup", "--find", "--show", *options, str(image)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    node = done.stdout.strip()
    name = os.path.basename(node)
    sysfs = os.path.realpath(f"/sys/class/block/{name}")
    try:
        yield BlockDevice(Slot(0, 1), name, node, KERNEL.read(f"{sysfs}/dev"), sysfs)
    finally:
        subprocess.run(["losetup", "--detach", node], check=True)


@contextlib.contextmanager
def mounted(device: BlockDevice, path: Path) -> Iterator[Path]:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", device.node, str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def ensure(
    device: BlockDevice,
    wanted: str,
    *,
    read_only: bool = False,
    preserve_data: bool = False,
) -> None:
    filesystems.ensure(KERNEL, device, wanted, read_only=read_only, preserve_data=preserve_data)


def digest(image: Path) -> str:
    """Of all that is there; holes are passed over, most of an image being one."""
    found = hashlib.sha256()
    with image.open("rb") as file:
        end = 0
        with contextlib.suppress(OSError):  # ENXIO: nothing but a hole is left
            while True:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                for offset in range(start, end, 4096):
                    part = os.pread(file.fileno(), min(4096, end - offset), offset)
                    if part.strip(b"\0"):
                        found.update(b"%d" % offset + part)
    return found.hexdigest()


@pytest.mark.parametrize("preserve_data", [False, True])
@pytest.mark.parametrize("wanted", filesystems.MAKEABLE)
def test_a_blank_disk_is_formatted_once(wanted: str, preserve_data: bool, tmp_path: Path) -> None:
    """And then it is what it is: not a byte of it changes."""
    image = image_of(tmp_path / "image", 320)
    with disk(image) as device:
        ensure(device, wanted, preserve_data=preserve_data)
        assert filesystems.detect_mountable(device) == wanted
        with mounted(device, tmp_path / "m") as path:
            (path / "file").write_text("kept")
        before = digest(image)
        ensure(device, wanted, preserve_data=preserve_data)
        assert digest(image) == before


@pytest.mark.parametrize("name", NOT_BLANK)
@pytest.mark.parametrize("wanted", filesystems.MAKEABLE)
def test_what_is_recognised_is_preserved(wanted: str, name: str, tmp_path: Path) -> None:
    """Whatever it is; the words say what. What serves as the wanted type is success."""
    kind, make = IMAGES[name]
    image = tmp_path / "image"
    make(image)
    before = digest(image)
    with disk(image) as device:
        if kind in SERVED[wanted]:
            ensure(device, wanted, preserve_data=True)
        else:
            with pytest.raises(RequestError, match=f"holds {kind}.* to be preserved") as caught:
                ensure(device, wanted, preserve_data=True)
            assert caught.value.code == HResult.ALREADY_EXISTS
    assert digest(image) == before


def test_a_blank_disk_can_be_asked_for(tmp_path: Path) -> None:
    """By those who will write to it in another way than by `ensure`."""
    image = image_of(tmp_path / "image", 16)
    with disk(image) as device:
        filesystems.check_blank(device, "xfs")
        filesystems.make(device, "ext4")
        with pytest.raises(RequestError, match=r"holds ext4, and its data .* no xfs was made"):
            filesystems.check_blank(device, "xfs")


def test_a_maker_is_a_program_or_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which can be known before anything is written."""
    with disk(image_of(tmp_path / "image", 16)) as device:
        filesystems.check_maker(device, "btrfs")
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(tmp_path))
            with pytest.raises(RequestError, match=r"this guest has no mkfs\.btrfs"):
                filesystems.check_maker(device, "btrfs")


@pytest.mark.parametrize("name", NOT_BLANK)
@pytest.mark.parametrize("wanted", filesystems.MAKEABLE)
def test_another_kind_is_replaced(wanted: str, name: str, tmp_path: Path) -> None:
    """That is what was asked for; nothing is left that could be taken for the old one."""
    kind, make = IMAGES[name]
    image = tmp_path / "image"
    make(image)
    os.truncate(image, max(image.stat().st_size, 320 << 20))
    before = digest(image)
    with disk(image) as device:
        ensure(device, wanted)
        if kind in SERVED[wanted]:
            assert digest(image) == before
        else:
            assert filesystems.detect_mountable(device) == wanted
            ensure(device, wanted, preserve_data=True)


@pytest.mark.parametrize("wanted", filesystems.MAKEABLE)
def test_a_read_only_disk_is_never_formatted(wanted: str, tmp_path: Path) -> None:
    """Whether the request says so or the kernel; the type that is there will do."""
    blank = image_of(tmp_path / "blank", 320)
    made = image_of(tmp_path / "made", 320)
    before = digest(blank)
    for option, read_only in (("--read-only", False), ("--nooverlap", True)):
        with (
            disk(blank, option) as device,
            pytest.raises(RequestError, match="read-only and holds no known filesystem"),
        ):
            ensure(device, wanted, read_only=read_only)
    with disk(made) as device:
        filesystems.make(device, wanted)
        ensure(device, wanted, read_only=True)
    with disk(made, "--read-only") as device:
        ensure(device, wanted)
        other = "xfs" if wanted != "xfs" else "ext4"
        with pytest.raises(RequestError, match=f"read-only and holds {wanted}: no {other}"):
            ensure(device, other)
    assert digest(blank) == before


@pytest.mark.parametrize("readable", [0, 1 << 16, 1 << 20])
@pytest.mark.parametrize("wanted", filesystems.MAKEABLE)
def test_a_disk_that_cannot_be_read_is_not_formatted(
    wanted: str, readable: int, tmp_path: Path
) -> None:
    """Nobody knows what is on it. (What the file behind it lacks cannot be read.)"""
    image = image_of(tmp_path / "image", 320)
    with disk(image) as device:
        os.truncate(image, readable)
        with pytest.raises(
            RequestError, match="cannot be read, so what is on it is not known: Inp"
        ):
            ensure(device, wanted)
        with pytest.raises(RequestError, match="cannot be read"):
            filesystems.detect_mountable(device)
    assert image.stat().st_size == readable
    assert image.stat().st_blocks == 0


@pytest.mark.parametrize(
    ("wanted", "offset", "mark"), [("xfs", 0x7E, b"\1"), ("btrfs", 0x10040, b"!")]
)
def test_what_was_never_finished_is_made_anew(
    wanted: str, offset: int, mark: bytes, tmp_path: Path
) -> None:
    """An mkfs that was interrupted leaves nothing to keep, but something to recognise."""
    image = image_of(tmp_path / "image", 320)
    with disk(image) as device:
        filesystems.make(device, wanted)
    write(image, offset, mark)
    with disk(image) as device:
        with pytest.raises(RequestError, match=f"holds unfinished {wanted}, which is no filesys"):
            filesystems.detect_mountable(device)
        with pytest.raises(RequestError, match=f"holds unfinished {wanted}, and its data"):
            ensure(device, wanted, preserve_data=True)
        ensure(device, wanted)
        assert filesystems.detect_mountable(device) == wanted
        with mounted(device, tmp_path / "m"):
            pass


def test_a_wanted_type_beside_an_older_mark_is_kept(tmp_path: Path) -> None:
    """Which is refused where it is not said as which to mount it."""
    image = image_of(tmp_path / "image", 16, "mkfs.ext4", "-F", "-q", "-O", "^resize_inode")
    write(image, 0x4000, b"SKUL\xba\xbe")
    before = digest(image)
    with disk(image) as device:
        ensure(device, "ext4")
        with pytest.raises(RequestError, match=r"crypto_LUKS and ext4, and its data .* preserved"):
            ensure(device, "ext4", preserve_data=True)
        assert filesystems.detect(device) == "crypto_LUKS"
        assert filesystems.detect(device, ("ext4",)) == "ext4"
        with pytest.raises(RequestError, match="the marks of crypto_LUKS and ext4; say as which"):
            filesystems.detect_mountable(device)
    assert digest(image) == before


def test_what_shows_through_a_raid_member_is_the_raids(tmp_path: Path) -> None:
    """Mounted by itself it would differ from the other members."""
    image = image_of(tmp_path / "image", 16, "mkfs.ext4", "-F", "-q")
    raid(image, -0x2000)
    before = digest(image)
    with disk(image) as device:
        with pytest.raises(RequestError, match="holds linux_raid_member and ext4, and its data"):
            ensure(device, "ext4", preserve_data=True)
        with pytest.raises(RequestError, match="the marks of linux_raid_member and ext4"):
            filesystems.detect_mountable(device)
        ensure(device, "ext4")
    assert digest(image) == before


def with_gpt(image: Path) -> None:
    """A partition table on top of what is there, as by somebody who gave the disk a new use."""
    subprocess.run(
        ["sfdisk", "--quiet", "--wipe", "never", str(image)],
        input="label: gpt\n,,\n",
        text=True,
        check=True,
        capture_output=True,
    )


def with_mbr(image: Path) -> None:
    write(image, 446, bytes((0, 0, 0, 0, 0x83, 0, 0, 0)) + struct.pack("<II", 2048, 2048))
    write(image, 510, b"\x55\xaa")


def with_luks(image: Path) -> None:
    """Of the first version, whose header leaves the ext4's where it is."""
    write(image, 0, b"LUKS\xba\xbe\0\1".ljust(592, b"\0"))


def with_swap(image: Path) -> None:
    write(image, 0x1000 - 10, b"SWAPSPACE2")
    write(image, 0x400, struct.pack("<II", 1, 1))


def with_xfs(image: Path) -> None:
    """The two that libblkid cannot choose between."""
    other = image_of(image.with_suffix(".xfs"), 320, "mkfs.xfs", "-f", "-q")
    write(image, 0, other.read_bytes()[:512])


@pytest.mark.parametrize(
    ("wanted", "spoil", "other"),
    [
        ("btrfs", with_gpt, "gpt"),
        ("ext4", with_mbr, "dos"),
        ("btrfs", with_mbr, "dos"),
        ("ext4", with_luks, "crypto_LUKS"),
        ("ext4", with_xfs, "xfs"),
        ("btrfs", with_xfs, "xfs"),
        ("btrfs", with_swap, "swap"),
        ("ext4", lambda image: raid(image, 0x1000), "linux_raid_member"),
    ],
)
@pytest.mark.parametrize("libblkid", [True, False])
def test_a_wanted_type_beside_something_else_is_not_preserved_by_mounting_it(
    wanted: str,
    spoil: Callable[[Path], None],
    other: str,
    libblkid: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of the two is old. All that is there is named, and not a byte of it changes."""
    if not libblkid:
        monkeypatch.setattr(blkid, "probe", lambda device: None)
    image = image_of(tmp_path / "image", 320)
    with disk(image) as device:
        filesystems.make(device, wanted)
        ensure(device, wanted, preserve_data=True)
    spoil(image)
    before = digest(image)
    with disk(image) as device:
        for read_only in (False, True):
            with pytest.raises(RequestError, match="not known, so it is not mounted") as caught:
                ensure(device, wanted, read_only=read_only, preserve_data=True)
            assert caught.value.code == HResult.ALREADY_EXISTS
            assert other in str(caught.value)
            assert f"{wanted}" in str(caught.value).partition(", and its data")[0]
        ensure(device, wanted)
    assert digest(image) == before


def test_a_boot_loader_is_not_something_else(tmp_path: Path) -> None:
    """Code and the mark of a boot sector, but no partitions."""
    image = image_of(tmp_path / "image", 16, "mkfs.ext4", "-F", "-q")
    write(image, 0, b"\xeb\x58\x90SYSLINUX".ljust(440, b"\x90"))
    write(image, 510, b"\x55\xaa")
    with disk(image) as device:
        ensure(device, "ext4", preserve_data=True)
        assert filesystems.detect_mountable(device) == "ext4"


def test_an_empty_partition_table_is_something(tmp_path: Path) -> None:
    """To those who preserve what is there, if it is all there is."""
    image = tmp_path / "image"
    write(image, 510, b"\x55\xaa")
    write(image, 440, b"\1\2\3\4")
    with disk(image) as device, pytest.raises(RequestError, match="holds dos, and its data"):
        ensure(device, "ext4", preserve_data=True)


def test_a_disk_in_use_is_not_formatted(tmp_path: Path) -> None:
    """The words say who uses it; the type that is there will do all the same."""
    image = image_of(tmp_path / "image", 320, "mkfs.ext4", "-F", "-q")
    with disk(image) as device, mounted(device, tmp_path / "m"):
        with pytest.raises(RequestError, match=f"not formatted: .*mounted at {tmp_path}/m"):
            ensure(device, "xfs")
        ensure(device, "ext4")
    assert superblocks.detect(str(image)) == "ext4"


def test_a_disk_that_another_has_for_itself_alone_is_left_to_it(tmp_path: Path) -> None:
    """As any mkfs does; it is named. (One that an agent has started is waited for: `orphans`.)"""
    image = image_of(tmp_path / "image", 16)
    maker = "import os, sys; os.open(sys.argv[1], os.O_EXCL); print(flush=True); sys.stdin.read()"
    with disk(image) as device:
        command = [sys.executable, "-c", maker, device.node]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            words = (
                rf"not formatted: .* in use; process {process.pid} \(.*\) has {device.node} open"
            )
            with pytest.raises(RequestError, match=words) as caught:
                ensure(device, "ext4")
            process.communicate()
    assert caught.value.code == HResult.INVALID_STATE
    assert image.stat().st_blocks == 0


@pytest.mark.parametrize(
    ("wanted", "mebibytes", "reason"),
    [("ext4", 0, "zero"), ("xfs", 16, "must be larger than 300MB"), ("btrfs", 16, "too small")],
)
def test_a_disk_that_is_too_small_is_told_of_in_mkfs_words(
    wanted: str, mebibytes: int, reason: str, tmp_path: Path
) -> None:
    """And stays as it was, without mkfs's usage in the words."""
    image = image_of(tmp_path / "image", mebibytes)
    with disk(image) as device, pytest.raises(RequestError, match=reason) as caught:
        ensure(device, wanted)
    assert f"disk 0:1 ({device.name}): mkfs.{wanted} failed (1): " in str(caught.value)
    assert "usage" not in str(caught.value).lower()
    assert image.stat().st_blocks == 0


def test_arguments_go_to_mkfs(tmp_path: Path) -> None:
    """After the usual ones, so that they count."""
    image = image_of(tmp_path / "image", 16)
    with disk(image) as device:
        filesystems.make(device, "ext4", ("-O", "^has_journal", "-L", "label"))
        done = subprocess.run(["dumpe2fs", "-h", device.node], check=True, capture_output=True)
    assert b"label" in done.stdout
    assert b"has_journal" not in done.stdout


@pytest.mark.parametrize("wanted", filesystems.MAKEABLE)
def test_a_big_disk_costs_little(wanted: str, tmp_path: Path) -> None:
    """A TiB: nothing is written that can wait, and nothing discarded."""
    image = image_of(tmp_path / "image", 1 << 20)
    with disk(image) as device:
        ensure(device, wanted)
        with mounted(device, tmp_path / "m"):
            pass
    # For xfs that is its log, which is half a GiB on so big a disk; here it is not written
    # but allocated.
    assert image.stat().st_blocks * 512 < 600 << 20
