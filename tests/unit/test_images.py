"""Image files checked against the format that is stated for them."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest
from support.qemu import convert, make_image

from hotlun.errors import BackendError
from hotlun.images import check_image
from hotlun.model import ImageFormat

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RAW, QCOW2, VHD, VHDX = ImageFormat
MADE_AS = {RAW: "raw", QCOW2: "qcow2", VHD: "vpc", VHDX: "vhdx"}
KINDS = [
    (QCOW2, ()),
    (QCOW2, ("-o", "compat=0.10")),
    (QCOW2, ("-o", "extended_l2=on")),
    (QCOW2, ("-o", "cluster_size=512,refcount_bits=1")),
    (QCOW2, ("-o", "preallocation=metadata")),
    (VHD, ()),
    (VHD, ("-o", "subformat=fixed")),
    (VHDX, ()),
    (VHDX, ("-o", "subformat=fixed")),
]
pytestmark = pytest.mark.qemu


def image(folder: Path, stated: ImageFormat, *options: str) -> Path:
    return folder / make_image(folder / f"disk.{stated}", MADE_AS[stated], "8M", *options)


def with_data(folder: Path, stated: ImageFormat, *options: str) -> Path:
    """An image with 4 MiB of data in it."""
    source = folder / "source"
    source.write_bytes(os.urandom(4 << 20))
    target = folder / f"disk.{stated}"
    convert(source, target, MADE_AS[stated], *options)
    return target


def patch(path: Path, *changes: tuple[int, bytes]) -> Path:
    """Write over some bytes; a negative offset counts from the end."""
    with path.open("r+b") as file:
        for offset, data in changes:
            file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
            file.write(data)
    return path


def refused(path: Path, stated: ImageFormat, why: str) -> None:
    """The image is refused for this reason, the file is named and not touched."""
    before = path.stat()
    with pytest.raises(BackendError, match=why) as caught:
        check_image(path, stated)
    after = path.stat()
    assert str(path) in str(caught.value)
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)


@pytest.mark.parametrize(("stated", "options"), KINDS)
def test_whole_images_are_accepted(
    tmp_path: Path, stated: ImageFormat, options: tuple[str, ...]
) -> None:
    """Empty and with data, of each kind that QEMU makes."""
    assert check_image(image(tmp_path, stated, *options), stated).format is stated
    if options != ("-o", "preallocation=metadata"):
        check_image(with_data(tmp_path, stated, *options), stated)


@pytest.mark.parametrize(("stated", "options"), KINDS)
def test_truncated_images_are_refused(
    tmp_path: Path, stated: ImageFormat, options: tuple[str, ...]
) -> None:
    """Wherever the cut is, from nothing left to a tenth missing."""
    if "preallocation=metadata" in "".join(options):
        path = image(tmp_path, stated, *options)
    else:
        path = with_data(tmp_path, stated, *options)
    size = path.stat().st_size
    for tenths in range(9, -1, -1):
        os.truncate(path, size * tenths // 10)
        refused(path, stated, "truncated|missing|footer")


@pytest.mark.parametrize("stated", [QCOW2, VHD, VHDX])
@pytest.mark.parametrize("real", list(ImageFormat))
def test_another_format_than_stated(tmp_path: Path, stated: ImageFormat, real: ImageFormat) -> None:
    """An image of one format is no image of another; raw bytes are none of any."""
    if stated is not real:
        refused(image(tmp_path, real), stated, f"not a usable {stated}")


@pytest.mark.parametrize("real", [QCOW2, VHD, VHDX])
def test_raw_is_not_looked_into(tmp_path: Path, real: ImageFormat) -> None:
    """What a guest writes to a raw disk, a container's header even, changes nothing."""
    path = image(tmp_path, real)
    os.chmod(path, 0o600)
    assert check_image(path, RAW).format is RAW


def test_what_is_no_image_file(tmp_path: Path) -> None:
    """Missing, a folder, a FIFO, empty, a broken link: refused, and nobody blocks."""
    refused_paths = {
        "missing": "No such file",
        "folder": "is a directory",
        "fifo": "not a regular file",
        "empty": "less than one sector",
        "link": "No such file",
    }
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("missing")
    for name, why in refused_paths.items():
        with pytest.raises(BackendError, match=why):
            check_image(tmp_path / name, RAW)


def test_links_are_resolved(tmp_path: Path) -> None:
    """What was checked is what is used: the path that comes back has no links in it."""
    path = image(tmp_path, RAW)
    (tmp_path / "link").symlink_to(path)
    assert check_image(tmp_path / "link", RAW).path == str(path.resolve())


QCOW2_PATCHES: dict[str, tuple[tuple[int, bytes], ...]] = {
    "its version": ((4, struct.pack(">I", 1)),),
    "clusters of": ((20, struct.pack(">I", 63)),),
    "encrypted": ((32, struct.pack(">I", 2)),),
    "too small for its size": ((24, struct.pack(">Q", 1 << 60)),),
    "marked as corrupt": ((72, struct.pack(">Q", 2)),),
    "data in another file": ((72, struct.pack(">Q", 4)),),
    "not known": ((72, struct.pack(">Q", 1 << 40)),),
    "truncated": ((36, struct.pack(">IQ", 1, 1 << 62)),),
    "not to be believed": ((56, struct.pack(">I", 1 << 31)),),
    "counts no references": ((48, struct.pack(">Q", 0x40)), (48, struct.pack(">QI", 0, 0))),
    "extension is out of place": ((112, struct.pack(">II", 1, 1 << 31)),),
    "name of its backing file": ((8, struct.pack(">QI", 1 << 50, 9)),),
}


@pytest.mark.parametrize("why", QCOW2_PATCHES)
def test_impossible_qcow2s(tmp_path: Path, why: str) -> None:
    """A header that cannot be, or asks for what is not given."""
    refused(patch(image(tmp_path, QCOW2), *QCOW2_PATCHES[why]), QCOW2, why)


def test_dirty_is_no_reason(tmp_path: Path) -> None:
    """A qcow2 whose writer died is repaired by QEMU when it opens it."""
    check_image(patch(image(tmp_path, QCOW2), (72, struct.pack(">Q", 1))), QCOW2)


def test_a_cluster_that_nobody_misses(tmp_path: Path) -> None:
    """Counted behind the end and in no table: a dead writer's leftover, not a truncation."""
    path = with_data(tmp_path, QCOW2)
    with path.open("rb") as file:
        file.seek(48)
        (table,) = struct.unpack(">Q", file.read(8))
        file.seek(table)
        (counts,) = struct.unpack(">Q", file.read(8))
    clusters = -(-path.stat().st_size // 65536)
    check_image(patch(path, (counts + 2 * (clusters + 9), b"\0\1")), QCOW2)


VHD_PATCHES: dict[str, tuple[tuple[int, bytes], ...]] = {
    "differencing": ((60, struct.pack(">I", 4)),),
    "neither a fixed nor a dynamic": ((60, struct.pack(">I", 9)),),
    "header of a dynamic disk is missing": ((512, b"nonsense"),),
    "truncated": ((512 + 28, struct.pack(">I", 1 << 31)),),
    "no VHD footer": ((0, b"nonsense"), (-512, b"nonsense")),
}


@pytest.mark.parametrize("why", VHD_PATCHES)
def test_impossible_vhds(tmp_path: Path, why: str) -> None:
    """A header that cannot be, or asks for a parent."""
    refused(patch(image(tmp_path, VHD), *VHD_PATCHES[why]), VHD, why)


def test_a_guest_cannot_turn_a_fixed_vhd_into_a_dynamic_one(tmp_path: Path) -> None:
    """The first sector is the guest's; a footer there would have QEMU follow the guest's tables."""
    path = image(tmp_path, VHD, "-o", "subformat=fixed")
    dynamic = image(tmp_path / "..", VHD).read_bytes()
    refused(patch(path, (0, dynamic[:1536])), VHD, "poses as a dynamic")


def test_a_dynamic_vhd_without_its_last_footer(tmp_path: Path) -> None:
    """The copy in front is enough, as long as every block is there."""
    path = with_data(tmp_path, VHD)
    os.truncate(path, path.stat().st_size - 512)
    check_image(path, VHD)


def metadata_items(path: Path) -> dict[bytes, int]:
    """Id -> where the item is, in a VHDX that QEMU made (its metadata is at 3 MiB)."""
    data = path.read_bytes()
    (count,) = struct.unpack_from("<H", data, (3 << 20) + 10)
    entries = (struct.unpack_from("<16sI", data, (3 << 20) + 32 * n) for n in range(1, count + 1))
    return {name: (3 << 20) + offset for name, offset in entries}


VHDX_PATCHES: dict[str, Callable[[int], tuple[tuple[int, bytes], ...]]] = {
    "signature": lambda _: ((0, b"x"),),
    "both its headers": lambda _: ((64 << 10, b"x"), (128 << 10, b"x")),
    "regi table is missing": lambda _: ((192 << 10, b"x"),),
    "regi table of": lambda _: (((192 << 10) + 8, b"\xff\xff\xff\xff"),),
    "regions are incomplete": lambda _: (((192 << 10) + 16, bytes(16)),),
    "metadata is incomplete": lambda _: (((3 << 20) + 32, bytes(16)),),
    "needs a parent": lambda parameters: ((parameters + 4, b"\2"),),
    "do not exist": lambda parameters: ((parameters, bytes(4)),),
    "too small for its size": lambda parameters: ((parameters + 8, b"\xff" * 8),),
    "truncated": lambda parameters: ((2 << 20, struct.pack("<Q", 1 << 50 | 6)),),
}


@pytest.mark.parametrize("why", VHDX_PATCHES)
def test_impossible_vhdxs(tmp_path: Path, why: str) -> None:
    """A header or table that cannot be, or asks for a parent."""
    path = image(tmp_path, VHDX)
    parameters = min(metadata_items(path).values())
    refused(patch(path, *VHDX_PATCHES[why](parameters)), VHDX, why)


def test_a_vhdx_with_a_log_to_replay(tmp_path: Path) -> None:
    """Its block table is not what it will be, so it says nothing about truncation."""
    path = image(tmp_path, VHDX)
    log = b"\1" * 16
    patch(path, ((64 << 10) + 48, log), ((128 << 10) + 48, log))
    check_image(patch(path, (2 << 20, struct.pack("<Q", 1 << 50 | 6))), VHDX)


def chain(folder: Path, below: str, stated: str = "qcow2") -> Path:
    """A qcow2 that names a backing file."""
    top = folder / "top.qcow2"
    options = ("-u", "-b", below, "-F", stated)
    make_image(top, "qcow2", "8M", *options)
    return top


@pytest.mark.parametrize(
    "below", ["base.qcow2", "/etc/passwd", "json:{}", "nbd://h/x", "file:/etc/passwd", "./a:b"]
)
def test_backing_files_are_refused(tmp_path: Path, below: str) -> None:
    """Whatever they are called, unless allowed."""
    image(tmp_path, QCOW2)
    refused(chain(tmp_path, below), QCOW2, "not allowed")


def test_a_protocol_is_never_allowed(tmp_path: Path) -> None:
    """A name that QEMU would not take for a path is not one."""
    top = chain(tmp_path, "file:base")
    (tmp_path / "file:base").write_bytes(bytes(512))
    with pytest.raises(BackendError, match="not allowed"):
        check_image(top, QCOW2, allow_backing=[str(tmp_path / "file:base")])


def test_a_backing_file_allowed_by_name(tmp_path: Path) -> None:
    """A whole chain, each image of which is allowed, checked, and of a stated format."""
    middle, bottom = tmp_path / "middle.qcow2", tmp_path / "bottom.raw"
    make_image(bottom, "raw", "8M")
    make_image(middle, "qcow2", "8M", "-b", "bottom.raw", "-F", "raw")
    top = chain(tmp_path, "middle.qcow2")
    found = check_image(top, QCOW2, allow_backing=[str(middle), str(bottom)])
    assert found.below == (str(middle), str(bottom))
    with pytest.raises(BackendError, match=r"'bottom\.raw', which is not allowed"):
        check_image(top, QCOW2, allow_backing=[str(middle)])
    os.truncate(bottom, 0)
    with pytest.raises(BackendError, match="less than one sector"):
        check_image(top, QCOW2, allow_backing=[str(middle), str(bottom)])


@pytest.mark.parametrize("stated", ["", "vmdk"])
def test_a_backing_file_needs_a_format(tmp_path: Path, stated: str) -> None:
    """One that is not stated would have to be probed."""
    base = image(tmp_path, RAW)
    top = chain(tmp_path, base.name, "raw")
    at = top.read_bytes().index(b"\xe2\x79\x2a\xca")
    patch(top, (at + 4, struct.pack(">I", len(stated)) + stated.encode().ljust(8, b"\0")))
    with pytest.raises(BackendError, match="which format its backing file"):
        check_image(top, QCOW2, allow_backing=[str(base)])


def test_an_image_below_itself(tmp_path: Path) -> None:
    """A loop is refused, not followed."""
    top = chain(tmp_path, "top.qcow2")
    with pytest.raises(BackendError, match="itself below it"):
        check_image(top, QCOW2, allow_backing=[str(top)])


@pytest.mark.parametrize("stated", [QCOW2, VHD, VHDX])
def test_random_damage(tmp_path: Path, stated: ImageFormat) -> None:
    """Whatever bytes the metadata has, the check ends, with the one error or none."""
    path = with_data(tmp_path, stated)
    whole = path.read_bytes()
    places = [0, 512, 1536, 64 << 10, 192 << 10, 2 << 20, 3 << 20, len(whole) - 512]
    for place in places:
        for step in range(0, 128, 3):
            for value in (b"\xff", b"\0", b"\x7f\xff\xff\xff"):
                at = place + step
                patch(path, (at, value))
                try:
                    check_image(path, stated)
                except BackendError:
                    pass
                finally:
                    patch(path, (at, whole[at : at + len(value)]))
