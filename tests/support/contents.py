"""What is on a test's disk, seen from the host: images with a filesystem and a note in it, and
which of their bytes were written.

Nothing is mounted here, and no image is read where it has holes.
"""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import tempfile
from pathlib import Path

from support.disks import FIRST_PARTITION, MIB, NOTE, blank

KIB = 1 << 10
BLOCK = 4096

SIZES = {"ext4": 32 * MIB, "xfs": 384 * MIB, "btrfs": 128 * MIB}
"""Bytes, little more than each is made on, encrypted too."""

SUPERBLOCKS = {"ext4": (1 * KIB, 1 * KIB), "xfs": (0, 512), "btrfs": (64 * KIB, 4 * KIB)}
"""Where the filesystem's own block is: offset and length in bytes."""
_UUIDS = {"ext4": 0x68, "xfs": 32, "btrfs": 32}

NEIGHBOUR = 8 * MIB
"""Bytes of the partitions before and behind the one that a test is about."""

_CHECKS = {
    "ext4": ("e2fsck", "-f", "-n"),
    "xfs": ("xfs_repair", "-n"),
    "btrfs": ("btrfs", "check", "--readonly"),
}


def made(path: Path, filesystem: str, note: str, size: int = 0) -> Path:
    """An image with a filesystem, and in it a file `note`."""
    blank(path, size or SIZES.get(filesystem, 16 * MIB))
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch, "tree")
        tree.mkdir()
        (tree / NOTE).write_text(note)
        if filesystem == "xfs":
            prototype = Path(scratch, "prototype")
            lines = ["/", "0 0", "d--755 0 0", f"{NOTE} ---644 0 0 {tree / NOTE}", "$", ""]
            prototype.write_text("\n".join(lines))
            command = ["mkfs.xfs", "-q", "-K", "-p", str(prototype), str(path)]
        elif filesystem == "btrfs":
            command = ["mkfs.btrfs", "-q", "-K", "--rootdir", str(tree), str(path)]
        elif filesystem == "erofs":
            command = ["mkfs.erofs", "--quiet", str(path), str(tree)]
        elif filesystem == "squashfs":
            command = ["mksquashfs", str(tree), str(path), "-quiet", "-noappend"]
        else:
            command = ["mke2fs", "-q", "-F", "-t", filesystem, "-d", str(tree), str(path)]
        subprocess.run(command, check=True, capture_output=True)
    return path


def iso9660(path: Path, note: str) -> Path:
    """A disc of the barest kind (ECMA-119): volume descriptors, a root, a file `NOTE`."""

    def both(number: int, size: int) -> bytes:
        return number.to_bytes(size, "little") + number.to_bytes(size, "big")

    def record(name: bytes, sector: int, length: int, flags: int) -> bytes:
        fixed = both(sector, 4) + both(length, 4) + bytes(7) + bytes((flags, 0, 0)) + both(1, 2)
        body = b"\0" + fixed + bytes((len(name),)) + name + bytes(1 - len(name) % 2)
        return bytes((len(body) + 1,)) + body

    sector = 2048
    root = record(b"\0", 18, sector, 2)
    directory = root + record(b"\1", 18, sector, 2) + record(b"NOTE.;1", 19, len(note), 0)
    primary = b"\1CD001\1\0" + b"LINUX".ljust(32) + b"HOTLUN".ljust(32) + bytes(8)
    primary += both(20, 4) + bytes(32) + both(1, 2) + both(1, 2) + both(sector, 2)
    primary += both(0, 4) + struct.pack("<4I", 0, 0, 0, 0) + root
    primary = primary.ljust(881, b" ") + b"\1"
    last = b"\xffCD001\1"
    content = [primary, last, directory, note.encode()]
    path.write_bytes(bytes(16 * sector) + b"".join(part.ljust(sector, b"\0") for part in content))
    return path


def three_partitions(path: Path, label: str, size: int) -> Path:
    """A table with a blank partition 2, between two that hold nothing that is known.

    Args:
        label: the table's type, `"gpt"` or `"dos"`.
    """
    blank(path, second_partition(size)[1] + NEIGHBOUR + 1 * MIB)
    script = f"label: {label}\n,{NEIGHBOUR // KIB}KiB\n,{size // KIB}KiB\n,{NEIGHBOUR // KIB}KiB\n"
    subprocess.run(["sfdisk", "--quiet", path], input=script, text=True, check=True)
    with path.open("r+b") as file:
        for start in (FIRST_PARTITION, second_partition(size)[1]):
            file.seek(start)
            file.write(b"neighbour" * 10_000)
    return path


def second_partition(size: int) -> tuple[int, int]:
    """Where partition 2 of `three_partitions` begins and ends, in bytes."""
    start = FIRST_PARTITION + NEIGHBOUR
    return start, start + size


def written(path: Path) -> dict[int, bytes]:
    """Every block that is not all zeros: a hash of it by its offset in bytes."""
    found = {}
    zeros = bytes(BLOCK)
    with path.open("rb") as file:
        size = path.stat().st_size
        offset = 0
        while offset < size:
            try:
                start = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            except OSError:  # ENXIO: all the rest is a hole
                break
            offset = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            for block in range(start // BLOCK * BLOCK, offset, BLOCK):
                content = os.pread(file.fileno(), BLOCK, block)
                if content != zeros[: len(content)]:
                    found[block] = hashlib.sha256(content).digest()
    return found


def allocated(path: Path) -> int:
    """Bytes that the image takes on the host."""
    return path.stat().st_blocks * 512


def superblock(path: Path, filesystem: str) -> bytes:
    """The filesystem's own block, with its UUID and its times."""
    offset, length = SUPERBLOCKS[filesystem]
    with path.open("rb") as file:
        return os.pread(file.fileno(), length, offset)


def uuid(path: Path, filesystem: str) -> bytes:
    """What tells one making of a filesystem from another."""
    start = _UUIDS[filesystem]
    return superblock(path, filesystem)[start : start + 16]


def check(path: Path, filesystem: str) -> None:
    """Have the filesystem's own tool look for damage."""
    subprocess.run([*_CHECKS[filesystem], path], check=True, capture_output=True)


def flip(path: Path, offset: int) -> None:
    """Change one byte, as a host could that is not to be trusted."""
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes((byte ^ 0x55,)), offset)
        os.fsync(file.fileno())


def file(path: Path, content: bytes) -> Path:
    """A file of these bytes."""
    path.write_bytes(content)
    return path
