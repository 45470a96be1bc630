"""The kernel's first files: a newc cpio archive, written here because it is thirty lines.

An initramfs may be several archives one after another. That is how the agent
gets into the guest: the archive with the modules is built with the image, the
one with the agent is appended when a VM is started. A new agent costs no new image.
"""

from __future__ import annotations

import stat

_TRAILER = "TRAILER!!!"


class Archive:
    """A cpio archive in the making (Linux: Documentation/driver-api/early-userspace).

    Everything belongs to root and was made at the epoch, so equal content
    gives equal bytes.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def directory(self, name: str) -> None:
        """Add an empty directory. Its parents must have been added before."""
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, content: bytes, *, executable: bool = False) -> None:
        """Add a regular file."""
        self._add(name, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def finished(self) -> bytes:
        """The whole archive, padded so that another one can follow."""
        closed = Archive()
        closed._parts = list(self._parts)
        closed._add(_TRAILER, 0, b"")
        return _padded(b"".join(closed._parts), 512)

    def _add(self, name: str, mode: int, content: bytes) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        # inode, mode, uid, gid, links, mtime, size, dev (2), rdev (2), name's size, checksum
        fields = (self._inode, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._parts.append(_padded(header + path, 4) + _padded(content, 4))


def _padded(data: bytes, to: int) -> bytes:
    return data + bytes(-len(data) % to)
