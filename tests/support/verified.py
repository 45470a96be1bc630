"""Images with a tree of hashes behind their filesystem, made by veritysetup on the host."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from support.disks import MIB

BLOCK = 4096
_HASHES = BLOCK // 32
"""Of SHA-256, in a block of the tree."""

FILES = ("first", "second", "third")
"""The files in each image; large enough for no two to share a block of hashes."""


class Verified(NamedTuple):
    """An image, and what veritysetup said of it.

    Args:
        size: bytes of the filesystem.
        tree: where the tree's header lies, in bytes.
    """

    path: Path
    root_hash: str
    size: int
    tree: int

    def data_of(self, name: str) -> int:
        """Where in the image the middle of a file lies."""
        content = _content(name)
        start = self.path.read_bytes().index(content[: 4 * BLOCK])
        return start + len(content) // 2

    def hash_of(self, offset: int) -> int:
        """Where in the image the block of hashes over an offset lies.

        The header has a block, then come the levels from the root down, of which an image of
        this size has two.
        """
        assert self.size // BLOCK <= _HASHES**2
        return self.tree + BLOCK * (2 + offset // BLOCK // _HASHES)

    @property
    def top(self) -> int:
        """Where in the image the block of hashes lies that the root hash is of."""
        return self.tree + BLOCK


def made(path: Path, filesystem: str, gap: int = 0, block: int = BLOCK) -> Verified:
    """An image of ext4 or erofs with `FILES`.

    Args:
        gap: bytes between the filesystem and the tree.
        block: of an ext4, in bytes; those that are hashed have 4 KiB in any case.
    """
    with tempfile.TemporaryDirectory() as tree:
        for name in FILES:
            Path(tree, name).write_bytes(_content(name))
        if filesystem == "erofs":
            command = ["mkfs.erofs", "--quiet", str(path), tree]
        else:
            command = ["mke2fs", "-q", "-t", "ext4", "-b", str(block), "-d", tree, str(path), "16M"]
        subprocess.run(command, check=True, capture_output=True)
    size = path.stat().st_size
    done = subprocess.run(
        [
            *("veritysetup", "format", f"--hash-offset={size + gap}"),
            *(f"--data-blocks={size // BLOCK}", path, path),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    found = re.search(r"Root hash:\s+([0-9a-f]{64})", done.stdout)
    assert found is not None, done.stdout
    with path.open("r+b") as file:
        file.truncate(-(-file.seek(0, 2) // MIB) * MIB)
    return Verified(path, found[1], size, size + gap)


def _content(name: str) -> bytes:
    """1 MiB that no other file has a block of."""
    lines = (f"{name} {number}\n".encode().rjust(64, b".") for number in range(MIB // 64))
    return b"".join(lines)
