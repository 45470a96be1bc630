"""`os` of the guest, as far as the agent uses it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import posixpath
import stat
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

from fuzz.guest.errors import StrayError
from fuzz.guest.tree import Node, Spot, failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from fuzz.guest.blocks import Blocks
    from fuzz.guest.tree import Tree

_FIRST = 100
_NEVER_OF_ROOT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_HARMLESS = (
    *("fsencode", "fsdecode", "strerror", "major", "minor", "makedev", "stat_result", "SEEK_END"),
    *("SEEK_SET", "R_OK", "W_OK", "X_OK", "F_OK", "fspath", "sep"),
)


class File:
    """What a descriptor is open on."""

    def __init__(self, spot: Spot, flags: int = 0, content: bytes = b"") -> None:
        self.spot = spot
        self.flags = flags
        self.content = content
        self.offset = 0
        self.unread: list[bytes] = []
        """What a context of fsopen(2) has to say yet."""
        self.context: dict[str, Any] | None = None

    @property
    def blocks(self) -> Blocks | None:
        return self.spot.node.blocks


class Files:
    """Stands in for `os`.

    Args:
        step: is told of each call before it is done, and may raise.
        claimed: whether a block device is anybody's alone.
    """

    def __init__(
        self, tree: Tree, step: Callable[[str], None], claimed: Callable[[Blocks], bool]
    ) -> None:
        self._tree = tree
        self._step = step
        self._claimed = claimed
        self._numbers = itertools.count(_FIRST)
        self.opened: dict[int, File] = {}
        tree.opened = self.opened
        self.no_file = tree.no_file
        self.environ = {"PATH": "/usr/sbin:/usr/bin"}
        self.path = Paths(self)

        for name in (*_HARMLESS, *(name for name in dir(os) if name.startswith("O_"))):
            setattr(self, name, getattr(os, name))

    def __getattr__(self, name: str) -> Any:
        raise StrayError(f"os.{name}")

    def forget(self) -> None:
        """Begin anew, with nothing open."""
        self.opened.clear()
        self._numbers = itertools.count(_FIRST)

    def add(self, file: File) -> int:
        """A descriptor for it."""
        descriptor = next(self._numbers)
        self.opened[descriptor] = file
        return descriptor

    def file(self, descriptor: int) -> File:
        """What a descriptor is of.

        Raises:
            OSError: nothing: EBADF.
        """
        try:
            return self.opened[descriptor]
        except KeyError:
            raise failure(errno.EBADF, descriptor) from None

    def find(self, path: str, dir_fd: int | None = None, *, follow: bool = True) -> Spot:
        start = None if dir_fd is None else self.file(dir_fd).spot
        return self._tree.walk(path, start, follow=follow)

    def path_of(self, spot: Spot) -> str:
        return self._tree.path_of(spot)

    # The functions.

    def getpid(self) -> int:
        return 77

    def uname(self) -> SimpleNamespace:
        return SimpleNamespace(machine="x86_64")

    def getrandom(self, size: int) -> bytes:
        self._step("getrandom")
        return bytes(range(1, size + 1))

    def open(self, path: str, flags: int, mode: int = 0o777, dir_fd: int | None = None) -> int:
        try:
            self._step("open")
        except OSError as error:
            if path != "/" or error.errno not in _NEVER_OF_ROOT:
                raise
        spot = self.find(path, dir_fd, follow=not flags & os.O_NOFOLLOW)
        node = spot.node
        if node.is_link and not flags & os.O_PATH:
            raise failure(errno.ELOOP, path)
        if flags & os.O_DIRECTORY and not node.is_directory:
            raise failure(errno.ENOTDIR, path)
        if flags & os.O_PATH:
            return self.add(File(spot, flags))
        if node.is_directory and flags & os.O_ACCMODE:
            raise failure(errno.EISDIR, path)
        content = b""
        if node.is_device:
            if node.blocks is None:
                raise failure(errno.ENXIO, path)
            if flags & os.O_ACCMODE and node.blocks.read_only:
                raise failure(errno.EACCES, path)
            if flags & os.O_EXCL and self._claimed(node.blocks):
                raise failure(errno.EBUSY, path)
        elif not node.is_directory:
            content = node.content if isinstance(node.content, bytes) else node.content()
        return self.add(File(spot, flags, content))

    def dup(self, descriptor: int) -> int:
        self._step("dup")
        return self.add(self.file(descriptor))

    def close(self, descriptor: int) -> None:
        self.file(descriptor)
        del self.opened[descriptor]

    def read(self, descriptor: int, size: int) -> bytes:
        self._step("read")
        file = self.file(descriptor)
        if file.context is not None:
            if not file.unread:
                raise failure(errno.ENODATA)
            return file.unread.pop(0)[:size]
        if file.spot.node.is_directory:
            raise failure(errno.EISDIR)
        part = file.content[file.offset : file.offset + size]
        file.offset += len(part)
        return part

    def write(self, descriptor: int, data: bytes) -> int:
        self._step("write")
        file = self.file(descriptor)
        if not file.flags & os.O_ACCMODE:
            raise failure(errno.EBADF)
        if file.spot.node.ordered is None:
            raise StrayError(f"os.write to {self._tree.path_of(file.spot)}")
        file.spot.node.ordered(bytes(data))
        return len(data)

    def pread(self, descriptor: int, size: int, offset: int) -> bytes:
        self._step("pread")
        return self._device(descriptor).read(offset, size)

    def preadv(self, descriptor: int, buffers: list[Any], offset: int) -> int:
        self._step("preadv")
        data = self._device(descriptor).read(offset, len(buffers[0]))
        buffers[0][: len(data)] = data
        return len(data)

    def pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        self._step("pwrite")
        file = self.file(descriptor)
        self._device(descriptor)
        self._tree.touch(file.spot.node)
        return self._device(descriptor).write(offset, bytes(data))

    def lseek(self, descriptor: int, offset: int, whence: int) -> int:
        file = self.file(descriptor)
        end = file.blocks.size if file.blocks else len(file.content)
        file.offset = offset + (end if whence == os.SEEK_END else 0)
        return file.offset

    def fsync(self, descriptor: int) -> None:
        self._step("fsync")
        self.file(descriptor)

    def _device(self, descriptor: int) -> Blocks:
        blocks = self.file(descriptor).blocks
        if blocks is None:
            raise failure(errno.ENODEV)
        return blocks

    def stat(
        self, path: str, *, dir_fd: int | None = None, follow_symlinks: bool = True
    ) -> os.stat_result:
        self._step("stat")
        return _status(self.find(path, dir_fd, follow=follow_symlinks).node)

    def lstat(self, path: str) -> os.stat_result:
        return self.stat(path, follow_symlinks=False)

    def fstat(self, descriptor: int) -> os.stat_result:
        return _status(self.file(descriptor).spot.node)

    def access(self, path: str, mode: int) -> bool:
        return self.path.exists(path)

    def listdir(self, path: str) -> list[str]:
        self._step("listdir")
        node = self.find(path).node
        if not node.is_directory:
            raise failure(errno.ENOTDIR, path)
        return [*node.entries]

    def scandir(self, path: str) -> AbstractContextManager[Iterator[SimpleNamespace]]:
        self._step("scandir")
        node = self.find(path).node
        if not node.is_directory:
            raise failure(errno.ENOTDIR, path)
        entries = [*node.entries.items()]
        return contextlib.nullcontext(
            SimpleNamespace(name=name, inode=lambda inode=entry.inode: inode)
            for name, entry in entries
        )

    def readlink(self, path: str, *, dir_fd: int | None = None) -> str:
        self._step("readlink")
        parent, name = posixpath.split(path)
        if parent and self.find(parent).node is self._tree.own_files:
            return self._tree.path_of(self.file(int(name)).spot)
        node = self.find(path, dir_fd, follow=False).node
        if not node.is_link:
            raise failure(errno.EINVAL, path)
        return node.target

    def mkdir(self, path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._step("mkdir")
        self._create(path, Node(stat.S_IFDIR | mode), dir_fd)

    def symlink(self, target: str, path: str, *, dir_fd: int | None = None) -> None:
        self._step("symlink")
        node = Node(stat.S_IFLNK | 0o777)
        node.target = target
        self._create(path, node, dir_fd)

    def rmdir(self, path: str, *, dir_fd: int | None = None) -> None:
        self._step("rmdir")
        self._remove(path, dir_fd, directory=True)

    def unlink(self, path: str, *, dir_fd: int | None = None) -> None:
        self._step("unlink")
        self._remove(path, dir_fd, directory=False)

    def setxattr(self, path: str, label: str, value: bytes) -> None:
        self._step("setxattr")
        self._tree.touch(self.find(path).node).labels[label] = value

    def getxattr(self, path: str, label: str, *, follow_symlinks: bool = True) -> bytes:
        self._step("getxattr")
        try:
            return self.find(path, follow=follow_symlinks).node.labels[label]
        except KeyError:
            raise failure(errno.ENODATA, path) from None

    def removexattr(self, path: str, label: str, *, follow_symlinks: bool = True) -> None:
        self._step("removexattr")
        node = self.find(path, follow=follow_symlinks).node
        if label not in node.labels:
            raise failure(errno.ENODATA, path)
        del self._tree.touch(node).labels[label]

    def killpg(self, group: int, signal: int) -> None:
        self._step("killpg")

    def _create(self, path: str, node: Node, dir_fd: int | None) -> None:
        parent, name = self._parent(path, dir_fd)
        if name in parent.node.entries:
            raise failure(errno.EEXIST, path)
        if len(os.fsencode(name)) > 255:
            raise failure(errno.ENAMETOOLONG, path)
        if self._tree.path_of(parent).split("/")[1] in ("proc", "sys"):
            raise failure(errno.EPERM, path)
        node.parent = parent.node
        self._tree.touch(parent.node).entries[name] = node

    def _remove(self, path: str, dir_fd: int | None, *, directory: bool) -> None:
        parent, name = self._parent(path, dir_fd)
        node = parent.node.entries.get(name)
        if node is None:
            raise failure(errno.ENOENT, path)
        if node.is_directory != directory:
            raise failure(errno.ENOTDIR if directory else errno.EISDIR, path)
        if node.entries:
            raise failure(errno.ENOTEMPTY, path)
        if any(covered is node for _, covered in [*self._tree.mounts]):
            raise failure(errno.EBUSY, path)
        del self._tree.touch(parent.node).entries[name]

    def _parent(self, path: str, dir_fd: int | None) -> tuple[Spot, str]:
        above, name = posixpath.split(path)
        if "\0" in name:
            raise ValueError("embedded null byte")
        parent = self.find(above, dir_fd)
        if not parent.node.is_directory:
            raise failure(errno.ENOTDIR, path)
        if not name or name in (".", ".."):
            raise failure(errno.EEXIST, path)
        return parent, name


class Paths:
    """Stands in for `os.path`."""

    basename = staticmethod(posixpath.basename)
    dirname = staticmethod(posixpath.dirname)
    join = staticmethod(posixpath.join)
    isabs = staticmethod(posixpath.isabs)
    normpath = staticmethod(posixpath.normpath)
    samestat = staticmethod(posixpath.samestat)
    split = staticmethod(posixpath.split)

    def __init__(self, files: Files) -> None:
        self._files = files

    def __getattr__(self, name: str) -> object:
        raise StrayError(f"os.path.{name}")

    def exists(self, path: str) -> bool:
        try:
            self._files.stat(path)
        except (OSError, ValueError):
            return False
        return True

    def lexists(self, path: str) -> bool:
        try:
            self._files.lstat(path)
        except (OSError, ValueError):
            return False
        return True

    def isdir(self, path: str) -> bool:
        try:
            return stat.S_ISDIR(self._files.stat(path).st_mode)
        except (OSError, ValueError):
            return False

    def isfile(self, path: str) -> bool:
        try:
            return stat.S_ISREG(self._files.stat(path).st_mode)
        except (OSError, ValueError):
            return False

    def realpath(self, path: str) -> str:
        """Without links, as far as it exists."""
        rest: list[str] = []
        while True:
            try:
                spot = self._files.find(path)
            except OSError:
                if path == "/":
                    raise
                path, name = posixpath.split(path)
                rest.append(name)
                continue
            return posixpath.join(self._files.path_of(spot), *reversed(rest))


class Stream:
    """Stands in for what `open(node, "r+b", buffering=0)` gives."""

    def __init__(self, files: Files, path: str, mode: str) -> None:
        self._files = files
        flags = os.O_RDWR if "+" in mode else os.O_RDONLY
        self._descriptor = files.open(path, flags)
        self._random = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor

    def seek(self, offset: int, whence: int) -> int:
        return self._files.lseek(self._descriptor, offset, whence)

    def read(self, size: int) -> bytes:
        """Of a device, from its start."""
        return self._files.pread(self._descriptor, size, 0)

    def readinto(self, buffer: bytearray) -> int:
        """Of /dev/urandom."""
        self._files._step("read")
        buffer[:] = bytes(next(self._random) % 255 + 1 for _ in buffer)
        return len(buffer)


def _status(node: Node) -> os.stat_result:
    device = 0
    if node.blocks is not None:
        major, _, minor = node.blocks.number.partition(":")
        device = os.makedev(int(major), int(minor))
    size = node.blocks.size if node.blocks else 0
    return os.stat_result(
        (node.mode, node.inode, 1, 1, node.uid, 0, size, 0, 0, 0),
        {"st_rdev": device},
    )
