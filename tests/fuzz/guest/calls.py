"""The guest's system calls that Python has no functions for: `ctypes` of the guest."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import TYPE_CHECKING, Any

from fuzz.guest.errors import StrayError
from fuzz.guest.files import File
from fuzz.guest.tree import Mount, Node, Spot, failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from fuzz.guest.files import Files
    from fuzz.guest.tree import Tree

_MS_REMOUNT, _MS_PROPAGATION = 1 << 5, (1 << 17) | (1 << 18) | (1 << 19) | (1 << 20)
_MNT_DETACH = 2
_NOFOLLOW, _MOUNT_ROOT = 0x100, 0x2000
"""Of statx(2)."""
_NO_SYMLINKS = struct.pack("=Q", 4)
"""Of openat2(2)."""
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_WORDS = ("discard", "sync", "dirsync", "mand", "lazytime", "ro", "noload", "norecovery", "context",
          "data", "rescue")  # fmt: skip
KNOWN = ("ext2", "ext3", "ext4", "xfs", "btrfs", "squashfs", "vfat", "proc")


class Calls:
    """Stands in for `ctypes`: its C library is the guest's kernel, its types are real.

    Args:
        step: as for `Files`.
    """

    def __init__(self, tree: Tree, files: Files, step: Callable[[str], None]) -> None:
        self._tree = tree
        self._files = files
        self._step = step
        self.busy: set[str] = set()
        """The numbers of devices whose mounts somebody works in."""
        self.functions: dict[str | int, Callable[..., int]] = {
            "mount": self._mount,
            "umount2": self._unmount,
            "statx": self._statx,
            "sync_file_range": lambda *_: 0,
            437: self._openat2,
            428: self._open_tree,
            429: self._move_mount,
            430: self._fsopen,
            431: self._fsconfig,
            432: self._fsmount,
            248: lambda *_: 7,
            250: lambda *_: 0,
        }

    def __getattr__(self, name: str) -> object:
        if name.startswith("c_") or name in (
            *("create_string_buffer", "byref", "get_errno", "set_errno"),
        ):
            return getattr(ctypes, name)
        raise StrayError(f"ctypes.{name}")

    def CDLL(self, name: str | None, use_errno: bool = False) -> Library:  # noqa: N802 - as ctypes calls it
        if name is not None:
            raise failure(errno.ENOENT, name)
        return Library(self)

    def call(self, function: str | int, *arguments: Any) -> int:
        """Do it; -1 and errno if it fails."""
        known = self.functions.get(function)
        if known is None:
            raise StrayError(f"system call {function}")
        try:
            self._step(str(function))
            return known(*arguments)
        except OSError as error:
            ctypes.set_errno(error.errno or errno.EIO)
            return -1

    def _mount(self, source: bytes, target: bytes, kind: bytes, flags: int, data: Any) -> int:
        spot = self._tree.walk(os.fsdecode(target))
        if flags & (_MS_REMOUNT | _MS_PROPAGATION):
            if spot.node is not spot.mount.root:
                raise failure(errno.EINVAL)
            return 0
        filesystem = os.fsdecode(kind)
        mount = self._superblock(filesystem, os.fsdecode(source))
        self._attach(mount, spot)
        return 0

    def _unmount(self, target: bytes, flags: int) -> int:
        spot = self._tree.walk(os.fsdecode(target), follow=not flags & 8)
        mount = spot.mount
        if spot.node is not mount.root or mount.below is None:
            raise failure(errno.EINVAL)
        users = [file for file in [*self._files.opened.values()] if file.spot.mount is mount]
        on_top = [below for below in [*self._tree.mounts] if below[0] is mount]
        if not flags & _MNT_DETACH and (users or on_top or mount.number in self.busy):
            raise failure(errno.EBUSY)
        self._tree.mounts.pop(mount.below, None)
        mount.below = None
        return 0

    def _statx(self, descriptor: int, path: bytes, flags: int, mask: int, found: Any) -> int:
        spot = self._files.file(descriptor).spot
        if path:
            spot = self._tree.walk(os.fsdecode(path), spot, follow=not flags & _NOFOLLOW)
        mount, node = spot
        struct.pack_into("<I4xQ", found, 0, mask, _MOUNT_ROOT if node is mount.root else 0)
        struct.pack_into("<I4xH", found, 20, node.uid, node.mode)
        struct.pack_into("<Q", found, 32, node.inode)
        struct.pack_into("<IIQ", found, 136, *map(int, mount.number.split(":")), mount.id)
        return 0

    def _openat2(self, _: int, path: bytes, how: bytes, size: ctypes.c_size_t) -> int:
        if how[16 : size.value] != _NO_SYMLINKS:
            raise failure(errno.EINVAL)
        spot, text = None, os.fsdecode(path)
        for part in filter(None, text.split("/")):
            spot = self._tree.walk(part if spot else f"/{part}", spot, follow=False)
            if spot.node.is_link:
                raise failure(errno.ELOOP, text)
        spot = spot or self._tree.walk("/")
        if not spot.node.is_directory:
            raise failure(errno.ENOTDIR, text)
        return self._files.add(File(spot))

    def _open_tree(self, descriptor: int, path: bytes, flags: int) -> int:
        mount, node = self._files.file(descriptor).spot
        clone = Mount(node, mount.number, mount.filesystem, mount.source)
        return self._files.add(File(Spot(clone, node)))

    def _move_mount(self, source: int, _: bytes, target: int, __: bytes, flags: int) -> int:
        mount = self._files.file(source).spot.mount
        if mount.below is not None:
            raise failure(errno.EINVAL)
        self._attach(mount, self._files.file(target).spot)
        return 0

    def _fsopen(self, filesystem: bytes, flags: int) -> int:
        name = os.fsdecode(filesystem)
        if name not in KNOWN:
            raise failure(errno.ENODEV)
        file = File(self._tree.no_file)
        file.context = {"type": name}
        return self._files.add(file)

    def _fsconfig(self, descriptor: int, command: int, key: Any, value: Any, _: int) -> int:
        file = self._files.file(descriptor)
        if file.context is None:
            raise failure(errno.EINVAL)
        if command == _CREATE:
            file.context["mount"] = self._superblock(
                file.context["type"], file.context.get("source", "")
            )
            return 0
        for text in (key, value):
            if text is not None and len(text) > 255:
                raise failure(errno.EINVAL)
        name = os.fsdecode(key)
        if name == "source":
            file.context["source"] = os.fsdecode(value)
        elif name not in _WORDS:
            file.unread.append(b"e " + b"ext4: Unknown parameter '" + key + b"'\n")
            raise failure(errno.EINVAL)
        return 0

    def _fsmount(self, descriptor: int, flags: int, attributes: int) -> int:
        context = self._files.file(descriptor).context
        mount = context.get("mount") if context else None
        if not isinstance(mount, Mount):
            raise failure(errno.EINVAL)
        return self._files.add(File(Spot(mount, mount.root)))

    def _superblock(self, filesystem: str, source: str) -> Mount:
        if filesystem not in KNOWN:
            raise failure(errno.ENODEV)
        node = self._tree.walk(source).node
        if not node.is_device or node.blocks is None:
            raise failure(errno.ENOTBLK)
        found = node.blocks.filesystem
        if found != filesystem:
            raise failure(errno.EINVAL)
        root = Node(0o040755)
        number = "0:40" if filesystem == "btrfs" else node.blocks.number
        return Mount(root, number, filesystem, source)

    def _attach(self, mount: Mount, spot: Spot) -> None:
        spot = self._tree.uppermost(spot)
        if not spot.node.is_directory:
            raise failure(errno.ENOTDIR)
        mount.below = spot
        self._tree.mounts[spot] = mount

    def mountinfo(self) -> bytes:
        """As /proc/self/mountinfo has it."""
        lines = ["20 1 0:2 / / rw - rootfs rootfs rw"]
        for (below, node), mount in [*self._tree.mounts.items()]:
            path = self._tree.path_of(Spot(below, node))
            for bad in "\\ \t\n":
                path = path.replace(bad, f"\\{ord(bad):03o}")
            lines.append(
                f"{mount.id} {below.id} {mount.number} / {path} rw,relatime shared:1 - "
                f"{mount.filesystem} {mount.source} rw"
            )
        return os.fsencode("\n".join(lines) + "\n")


class Library:
    """The C library."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._functions: dict[str, Function] = {}

    def __getattr__(self, name: str) -> Function:
        if name not in self._functions:
            self._functions[name] = self[name]
        return self._functions[name]

    def __getitem__(self, name: str) -> Function:
        if name != "syscall" and name not in self._calls.functions:
            raise AttributeError(name)
        return Function(self._calls, name)


class Function:
    """One of its functions, a new object each time that it is asked for by item."""

    argtypes: tuple[Any, ...]
    restype: Any

    def __init__(self, calls: Calls, name: str) -> None:
        self._calls = calls
        self._name = name

    def __call__(self, *arguments: Any) -> int:
        if self._name == "syscall":
            number, *arguments_of_it = arguments
            number = getattr(number, "value", number)
            return self._calls.call(number, *arguments_of_it)
        return self._calls.call(self._name, *arguments)
